"""Models, tokenizers and the like made of a directory by transformers or diffusers: never by code that lies in it.

`auto_map` in a model's files names classes of its own, in Python files beside them. Unless it is told otherwise,
transformers asks on standard input whether to run them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from detune.checkpoints.layout import read_json
from detune.errors import InputError, parsing

__all__ = ["load_pretrained", "model_class_of", "require_reasonable"]

# Keys of a configuration, and the most that each may be: several times what the largest published models have.
MOST = {
    r"layers?$|depths?$|^(num|n)_.*(layer|block|stage)|^n_layer": 2000,
    r"experts?$": 10_000,
    r"labels?$|^(id2label|label2id)$": 1_000_000,
    r"heads?$": 100_000,
    r"position|^n_ctx$": 2**24,
}


def load_pretrained(factory: Any, directory: Path | str, **options: Any) -> Any:
    """Make something of the files of a directory, with the library's own code alone, and without a network.

    Args:
        factory: A class of transformers or diffusers with `from_pretrained`: `AutoTokenizer`, `UNet2DConditionModel`.
        directory: In the layout that `save_pretrained` writes.
        options: For `from_pretrained`.

    Returns:
        What it returns.

    Raises:
        InputError: The directory cannot be used without its own code.
        Exception: Whatever the library raises of other files.

    Example:
        >>> load_pretrained(AutoModel, "my-model", dtype=torch.float32)  # doctest: +SKIP
    """
    path = Path(directory) / "config.json"
    if path.is_file():
        require_reasonable(read_json(path), path)
    if factory.__module__.startswith("diffusers."):
        _require_libraries(Path(directory) / "model_index.json")
    # The models of diffusers run no code of others, and take the option for a part of their configuration.
    if not (factory.__module__.startswith("diffusers.") and issubclass(factory, torch.nn.Module)):
        options["trust_remote_code"] = False
    try:
        return factory.from_pretrained(directory, local_files_only=True, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise _own_code(directory) from None


def _own_code(directory: Path | str) -> InputError:
    return InputError(
        f"{directory} needs code of its own",
        "its files name classes in Python files beside them, and no code of a model is run here",
        "give a model whose class is one of transformers or diffusers",
    )


def _require_libraries(path: Path) -> None:
    """Refuse a pipeline with parts of other libraries: old versions of diffusers import whatever it names."""
    if not path.is_file():
        return
    from diffusers import pipelines

    with parsing(path):
        index = read_json(path)
        parts = [part[0] for name, part in index.items() if not name.startswith("_") and isinstance(part, list)]
        known = [library in (None, "diffusers", "transformers") or hasattr(pipelines, library) for library in parts]
        if not all(known) or not isinstance(index.get("_class_name", ""), str):
            raise _own_code(path.parent)


def require_reasonable(config: Any, where: Path) -> None:
    """Refuse a configuration that no model has: a library makes as many layers and labels as it says.

    Args:
        config: As JSON.
        where: Where it stands, for messages.

    Raises:
        InputError: It asks for more than `MOST` of something.
    """
    with parsing(where):
        for key, value in _numbers(config):
            for pattern, most in MOST.items():
                if value > most and re.search(pattern, key):
                    raise InputError(
                        f"{where} is of no model", f"its {key} is {value:.3g}, expected at most {most}", "copy it again"
                    )


def _numbers(content: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration, and the sizes of its tables and lists, each with the key that it stands under."""
    if isinstance(content, dict | list):
        yield key, len(content)
        for name, value in content.items() if isinstance(content, dict) else ((key, value) for value in content):
            yield from _numbers(value, name)
    elif isinstance(content, int | float):
        yield key, content


def model_class_of(config: Any) -> Any:
    """The class of transformers that a configuration names; the model's body where it names none.

    Args:
        config: Config of transformers.

    Raises:
        InputError: It names something else.
    """
    import transformers

    name = (config.architectures or [None])[0]
    if name is None:
        return transformers.AutoModel
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"no model of the class {name!r}", "the configuration names it, transformers has none", "check config.json"
        )
    return found
