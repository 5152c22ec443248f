"""The demonstration: real LoRAs of a real model, trained, merged and undone, without a network.

`texts` finds the training texts, `train` makes the fine-tunes. Needs `pip install 'detune[demo]'`.
"""
