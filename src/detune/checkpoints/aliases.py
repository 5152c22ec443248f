"""Names of weights in memory, where transformers stores them under other names.

Since version 5 some models have other module names than their checkpoints, and an adapter trained on such a
model has the new ones: `layers.0.attention.q_proj` for what a ViT checkpoint calls
`encoder.layer.0.attention.attention.query`.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["names_in_memory"]

logger = logging.getLogger(__name__)


def names_in_memory(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Rename stored weights as transformers does when it loads them.

    Only renamed weights are covered, not those that loading fuses or splits.

    Args:
        directory: A model's directory, with its `config.json`.
        names: Names as stored.

    Returns:
        Name in memory to name as stored; empty where transformers is absent or does not know the model.
    """
    # The table of names is not a stable interface, and a model may be anything. Whatever goes wrong here, the
    # caller finds no name and says so.
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        aliases: dict[str, str] = {}
        for stored in names:
            name = stored
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            aliases[name] = stored
    except Exception as error:
        logger.debug("transformers has no other names for %s: %s", directory, error)
        return {}
    return aliases
