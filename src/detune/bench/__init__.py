"""LoWRA Bench: load it, build subsets like it, run recovery methods on it, and read what came out.

The benchmark is that of Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208): rows of one weight matrix of a base model
with the LoRAs that were trained on it. Needs `pip install 'detune[bench]'`.
"""
