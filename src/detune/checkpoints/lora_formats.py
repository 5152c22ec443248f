"""Formats of LoRA files: PEFT's, diffusers' and kohya's, brought into one table of factors.

| format | file | names | alpha |
| --- | --- | --- | --- |
| PEFT | `adapter_model.safetensors` or `.bin` | `base_model.model.x.lora_A.weight` | in `adapter_config.json` |
| diffusers | `pytorch_lora_weights.safetensors` or any | `unet.x.lora.down.weight` and others | in its metadata |
| kohya | any | `lora_unet_x_y.lora_down.weight` | in `lora_unet_x_y.alpha` |

A file without any alpha means alpha = rank: so do diffusers and kohya's trainer read it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detune._runtime import needs_extra
from detune.checkpoints.layout import read_json
from detune.checkpoints.module_patterns import by_module
from detune.checkpoints.source import Checkpoint
from detune.errors import InputError

__all__ = ["AdapterTable", "Factors", "Scaling", "check_config", "rank_of", "read_table"]

# Settings of LoraConfig under which a merge is more than W + scaling * B @ A on the named modules.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights as well.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
# Endings that diffusers and kohya put behind a layer's name for its A. Without it, and with .alpha, that is its alpha.
_DOWN = re.compile(r"[._]lora(_A|_down|\.down|_linear_layer\.down)\.weight$")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Factors:
    """The factors of one layer, as their file has them.

    Attributes:
        module: The layer, `bert.encoder.layer.0.attention.self.query`; below `component/` in a pipeline.
        A: Name of the tensor (r, in), or (r, in, *kernel).
        B: Name of the tensor (out, r), or (out, r, 1, ...).
        rank: r.
        alpha: The update is `alpha / rank * B @ A`; of a rank-stabilised LoRA that is its alpha times sqrt(r).
        scaling: `alpha / rank`, to the last bit as PEFT computes it.
        is_embedding: Whether the layer is an embedding, whose weight is (in, out).
        base_layer: Name of the frozen weight that PEFT stores beside the factors of an embedding.
    """

    module: str
    A: str
    B: str
    rank: int
    alpha: float
    scaling: float
    is_embedding: bool
    base_layer: str | None


@dataclass(frozen=True)
class AdapterTable:
    """All of an adapter.

    Attributes:
        factors: One row a layer.
        extra: Names of tensors that were trained in full beside the LoRA.
        fan_in_fan_out: Whether linear layers store (in, out), where their shape does not tell.
    """

    factors: tuple[Factors, ...]
    extra: tuple[str, ...]
    fan_in_fan_out: bool


def read_table(adapter: Checkpoint, *, allow_extra: bool) -> AdapterTable:
    """Read what an adapter's headers and configuration say; of its tensors, only kohya's alphas.

    Args:
        adapter: The adapter's one weight file.
        allow_extra: Whether modules trained in full (PEFT's `modules_to_save`) are listed instead of refused.

    Returns:
        The table.

    Raises:
        InputError: The file is no LoRA, is incomplete, or changes more than `W + scaling * B @ A` can say.
        DetuneError: The file is diffusers' or kohya's, and diffusers is not installed.
    """
    file = adapter.root / adapter.weight_files[0].file
    if not any("lora" in name for name in adapter.tensors):
        raise InputError(
            f"{file} is no LoRA",
            f"found no lora_A and lora_B at all, nor lora_down and lora_up, among its {len(adapter.tensors)} tensors",
            "give an adapter that PEFT, diffusers or kohya's trainer saved",
        )
    if file.stem == "adapter_model":
        return _read_peft(adapter, file, allow_extra)
    return _read_diffusers(adapter, file)


def _read_peft(adapter: Checkpoint, file: Path, allow_extra: bool) -> AdapterTable:
    path = adapter.root / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is malformed", "expected a table", "copy the adapter again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"adapter {path.parent} is of type {kind}", "only LORA is read here", _merge_first(file))
    check_config(config, file, () if allow_extra else ("modules_to_save",))
    trained = [f".{module}." for module in config.get("modules_to_save") or ()]
    stored = {name.removeprefix("base_model.model."): name for name in adapter.tensors}
    extra = {name: key for name, key in stored.items() if any(module in f".{name}" for module in trained)}
    factors = _pair(adapter, file, {name: key for name, key in stored.items() if name not in extra}, {"": config})
    return AdapterTable(factors, tuple(extra.values()), bool(config.get("fan_in_fan_out")))


def _read_diffusers(adapter: Checkpoint, file: Path) -> AdapterTable:
    try:
        metadata = json.loads(adapter.weight_files[0].metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise InputError(f"{file} has metadata that is not valid JSON", str(error), "copy the adapter again") from error
    if not isinstance(metadata, dict):
        raise InputError(f"{file} has malformed metadata", "expected a table of settings", "copy the adapter again")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    for config in configs.values():
        check_config(config, file, ("modules_to_save",))
    alphas = {name: name for name in adapter.tensors if name.endswith(".alpha")}
    renamed = _peft_names([name for name in adapter.tensors if name not in alphas], file)
    return AdapterTable(_pair(adapter, file, renamed | alphas, configs), (), False)


def check_config(config: Mapping[str, Any], file: Path, also_refused: Sequence[str] = ()) -> None:
    """Refuse settings under which an adapter is more than `W + scaling * B @ A`.

    Args:
        config: As in PEFT's LoraConfig.
        file: The adapter, for messages.
        also_refused: Settings that may not be there either.

    Raises:
        InputError: There are some.
    """
    unsupported = [f"{key}={json.dumps(config[key])}" for key in (*_UNSUPPORTED, *also_refused) if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']}")
    if unsupported:
        _refuse(file, f"it has {', '.join(unsupported)}")


def _refuse(file: Path, found: str) -> None:
    raise InputError(f"adapter {file} is more than plain LoRA", found, _merge_first(file))


def _merge_first(file: Path) -> str:
    if file.stem in ("adapter_model", "adapter_config"):
        return f"merge {file.parent.name} with PEFT's merge_and_unload and give the merged model"
    return f"merge {file.name} with diffusers' fuse_lora and give the merged model"


def _peft_names(names: Sequence[str], file: Path) -> dict[str, str]:
    """Rename tensors of diffusers and kohya as PEFT would, with diffusers' own tables.

    Args:
        names: Names in the file.
        file: For messages.

    Returns:
        `component/module.lora_A.weight` to the name in the file.
    """
    with needs_extra("bench"):
        from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
        from diffusers.utils import state_dict_utils

    tables: Any = state_dict_utils
    loader: Any = StableDiffusionLoraLoaderMixin
    if all(name.startswith(_KOHYA) for name in names):
        _check_kohya(names, file)
    # The tables only rename, so a name stands in for its tensor and no tensor is read.
    state, _ = loader.lora_state_dict({name: name for name in names})
    parts: dict[str, dict[str, str]] = {}
    for key, name in state.items():
        component, _, rest = key.partition(".")
        # Before diffusers had components in its LoRAs they were the U-Net's.
        component, rest = (component, rest) if component in _COMPONENTS else ("unet", key)
        parts.setdefault(component, {})[rest] = name
    renamed: dict[str, str] = {}
    for component, part in parts.items():
        if component.startswith("text_encoder"):
            part = tables.convert_state_dict_to_diffusers(part, original_type=tables.StateDictType.DIFFUSERS_OLD)
            part = tables.convert_state_dict_to_peft(part, original_type=tables.StateDictType.DIFFUSERS)
        else:
            part = tables.convert_unet_state_dict_to_peft(part)
        renamed |= {f"{component}/{key}": name for key, name in part.items()}
    if len(renamed) < len(names):
        (lost, *_) = set(names) - set(renamed.values())
        _refuse(file, f"two tensors have the part of {lost!r}")
    return renamed


def _check_kohya(names: Sequence[str], file: Path) -> None:
    partners = {"lora_down.weight": "lora_up.weight", "lora_up.weight": "lora_down.weight"}
    for name in names:
        module, _, kind = name.partition(".")
        if kind not in partners:
            _refuse(file, f"found tensor {name!r}")
        if f"{module}.{partners[kind]}" not in names:
            raise InputError(
                f"{file} is incomplete", f"module {module!r} has {kind} and no {partners[kind]}", "copy it again"
            )


def _pair(
    adapter: Checkpoint, file: Path, named: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[Factors, ...]:
    """Find the two factors of each layer, and its alpha.

    Args:
        adapter: The file, opened.
        file: Its path.
        named: PEFT's name for each tensor, `component/module.lora_A.weight`, to its name in the file.
        configs: The settings of each component, as in PEFT's LoraConfig; of others, alpha is a tensor.
    """
    pairs: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for name, stored in named.items():
        match = _FACTOR.fullmatch(name)
        if match:
            pairs.setdefault(match["module"], {})[match["kind"].removeprefix("lora_")] = stored
        else:
            others[name] = stored
    has_alphas = any(name.endswith(".alpha") for name in others)
    modules = [module.rpartition("/") for module in pairs]
    scalings = {
        component: Scaling.read(config, [path for place, _, path in modules if place == component], file)
        for component, config in configs.items()
    }
    factors: list[Factors] = []
    for module, pair in pairs.items():
        is_embedding = "embedding_A" in pair
        kinds = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        if set(pair) != set(kinds):
            raise InputError(f"{file} is incomplete", f"module {module!r} has only {sorted(pair)}", "copy it again")
        A, B = (pair[kind] for kind in kinds)
        rank = rank_of(adapter, file, module, A, B)
        component, _, path = module.rpartition("/")
        if component in scalings:
            alpha, scaling = scalings[component].of(path, rank, file)
        elif has_alphas:
            alpha = _stored_alpha(adapter, file, module, others.pop(_DOWN.sub(".alpha", A), None))
            scaling = alpha / rank
        else:
            alpha, scaling = float(rank), 1.0
        # PEFT saves the frozen weight of a targeted embedding beside its factors, and loads it over the base's.
        base_layer = others.pop(f"{module}.base_layer.weight", None)
        factors.append(Factors(module, A, B, rank, alpha, scaling, is_embedding, base_layer))
    if others:
        _refuse(file, f"found tensor {min(others.values())!r}")
    return tuple(factors)


def rank_of(adapter: Checkpoint, file: Path, module: str, A: str, B: str) -> int:
    """The rank of two factors.

    Args:
        adapter: The checkpoint that holds them.
        file: For messages.
        module: Likewise.
        A: Name of one.
        B: Name of the other.

    Raises:
        InputError: They do not fit each other.
    """
    a, b = adapter.tensors[A].shape, adapter.tensors[B].shape
    # The B of a kernel is a convolution of size one: together they are one product of matrices.
    fits = len(a) == len(b) >= 2 and a[0] == b[1] > 0 and all(size == 1 for size in b[2:])
    if not fits:
        raise InputError(
            f"the factors of module {module!r} in {file} do not fit each other",
            f"A has shape {a} and B {b}, expected (r, in) and (out, r) with r of at least 1",
            "copy the adapter again",
        )
    return a[0]


def _stored_alpha(adapter: Checkpoint, file: Path, module: str, stored: str | None) -> float:
    if stored is None:
        raise InputError(f"{file} has no alpha for module {module!r}", "other modules have one", "copy it again")
    info = adapter.tensors[stored]
    if math.prod(info.shape) != 1 or info.dtype.is_complex:
        raise InputError(
            f"{stored!r} in {file} is no number", f"it has shape {info.shape} in {info.dtype}", "copy the adapter again"
        )
    return _finite(float(adapter.read(stored)), f"the alpha of {module!r} in {file}")


@dataclass(frozen=True)
class Scaling:
    """The part of a LoraConfig that sets the size of the updates.

    Attributes:
        ranks: r by module.
        alphas: lora_alpha by module.
        rank_stabilised: Whether the update is divided by the root of the rank.
    """

    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rank_stabilised: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Sequence[str], file: Path) -> "Scaling":
        """Read it for some modules; the file is for messages."""
        return cls(
            by_module(config.get("rank_pattern"), config.get("r"), modules, f"rank_pattern of {file}"),
            by_module(config.get("alpha_pattern"), config.get("lora_alpha"), modules, f"alpha_pattern of {file}"),
            bool(config.get("use_rslora")),
        )

    def of(self, module: str, rank: int, file: Path) -> tuple[float, float]:
        """Alpha of a module whose factors have a rank, and what the update is multiplied by."""
        expected = self.ranks[module]
        if rank != expected:
            raise InputError(
                f"{file} does not fit its configuration",
                f"module {module!r} has rank {rank}, expected {expected}",
                "copy the adapter again",
            )
        alpha = self.alphas[module]
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise InputError(f"{file} has no lora_alpha", f"got {alpha!r} for {module!r}", "copy the adapter again")
        if self.rank_stabilised:
            return _finite(alpha * math.sqrt(rank), f"lora_alpha in {file}"), alpha / math.sqrt(rank)
        return _finite(alpha, f"lora_alpha in {file}"), alpha / rank


def _finite(alpha: float, what: str) -> float:
    try:
        found = float(alpha)
    except OverflowError:  # an integer of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"{what} is no number to multiply by", f"got {found}", "copy the adapter again")
    return found
