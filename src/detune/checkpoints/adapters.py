"""A model with a PEFT LoRA adapter merged on the fly, tensor by tensor.

For a linear layer the merged weight is

    W + scaling * B @ A,        scaling = alpha / r, or alpha / sqrt(r) with rsLoRA.

The order of casts is PEFT's own (`merge_and_unload` after `PeftModel.from_pretrained`, on the CPU), so that
the result has the same bits: A and B are held in float32 (float64 for a float64 base); the product is added
to a half precision W with one rounding at the end, except for embeddings, where PEFT rounds the product
first.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from detune.checkpoints.aliases import names_in_memory
from detune.checkpoints.blocks import copy_block, file_hash
from detune.checkpoints.layout import read_json
from detune.checkpoints.source import Checkpoint
from detune.errors import InputError

__all__ = ["MergedCheckpoint"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Settings of LoraConfig under which a merge is more than W + scaling * B @ A on the named modules.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
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


@dataclass(frozen=True)
class _Update:
    """How the adapter changes one tensor: names of its factors in the adapter file, and the scaling."""

    factor_a: str
    factor_b: str
    scaling: float
    is_embedding: bool
    base_layer: str | None


class MergedCheckpoint(Checkpoint):
    """`BASE+ADAPTER` as if merged and saved; tensors the adapter leaves alone pass through unchanged.

    Args:
        spec: The model as the user typed it.
        base: The base model.
        adapter: The adapter's weight file, beside its `adapter_config.json`.
        merge_dtype: The dtype of the merged tensors; None is the base's, bit for bit as PEFT merges.

    Raises:
        InputError: The adapter is more than plain LoRA, or does not fit the base.
        ValueError: `merge_dtype` is not a floating point dtype that can be merged in.
    """

    def __init__(
        self, spec: str, base: Checkpoint, adapter: Checkpoint, *, merge_dtype: torch.dtype | None = None
    ) -> None:
        self.spec = spec
        self.root = base.root
        self.index_files = base.index_files
        self._base = base
        self._adapter = adapter
        if merge_dtype is not None and merge_dtype not in _FLOATS:
            raise ValueError(f"merge_dtype is {merge_dtype}, expected one of {_FLOATS}")
        config = _read_config(adapter.root / "adapter_config.json")
        self._fan_in_fan_out = bool(config.get("fan_in_fan_out"))
        self._updates = _plan_updates(base, adapter, config)

        tensors = dict(base.tensors)
        for name in self._updates:
            info = tensors[name]
            if info.dtype not in _FLOATS:
                raise InputError(
                    f"cannot merge into tensor {name!r} in {base.root / info.file}",
                    f"it is stored as {info.dtype}",
                    "use the unquantised base model",
                )
            dtype = merge_dtype or info.dtype
            tensors[name] = replace(info, dtype=dtype, nbytes=math.prod(info.shape) * dtype.itemsize)
        self.tensors = MappingProxyType(tensors)
        # The base's header still describes a file in which no tensor has changed its dtype.
        self.weight_files = tuple(
            file
            if all(tensors[name].dtype is base.tensors[name].dtype for name in file.names)
            else replace(file, header=None)
            for file in base.weight_files
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """What on disk belongs to this model and must not be overwritten."""
        return (*self._base.paths, self._adapter.root)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, merged where the adapter touches it; see `Checkpoint.read`.

        Args:
            name: A key of `tensors`.

        Returns:
            A new CPU tensor in the dtype and shape of its `TensorInfo`.

        Raises:
            InputError: A file can no longer be read, or the factors do not fit the weight.
        """
        update = self._updates.get(name)
        if update is None:
            return self._base.read(name)
        dtype = self.tensors[name].dtype
        weight = self._base.read(name) if update.base_layer is None else self._adapter.read(update.base_layer)
        weight = weight.to(self._base.tensors[name].dtype).to(dtype)
        compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        factor_a = self._adapter.read(update.factor_a).to(compute_dtype)
        factor_b = self._adapter.read(update.factor_b).to(compute_dtype)
        delta = self._delta(factor_a, factor_b, weight.shape, update)
        if delta.shape != weight.shape:
            raise InputError(
                f"adapter {self._adapter.root} does not fit tensor {name!r}",
                f"its update has shape {tuple(delta.shape)}, the weight {tuple(weight.shape)}",
                "use the base model the adapter was trained on",
            )
        weight += delta.to(dtype) if update.is_embedding else delta
        return weight

    def _delta(
        self, factor_a: torch.Tensor, factor_b: torch.Tensor, shape: torch.Size, update: _Update
    ) -> torch.Tensor:
        # Each product is written exactly as PEFT writes it: another order of operations gives other bits.
        if update.is_embedding:
            return (factor_b @ factor_a).T * update.scaling
        if factor_a.ndim == 2:
            product = factor_b @ factor_a
            # One adapter can hold layers of both kinds, so the shape decides wherever it can.
            transposed = self._fan_in_fan_out if shape[0] == shape[-1] else product.shape != shape
            return (product.T if transposed else product) * update.scaling
        if factor_a.shape[2:] == (1, 1):
            product = factor_b.squeeze(3).squeeze(2) @ factor_a.squeeze(3).squeeze(2)
            return product.unsqueeze(2).unsqueeze(3) * update.scaling
        convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[factor_a.ndim]
        return convolve(factor_a.transpose(0, 1), factor_b).transpose(0, 1) * update.scaling

    def read_bytes(
        self, name: str, start: int = 0, length: int | None = None, out: memoryview | None = None
    ) -> memoryview:
        """Read a block of a tensor's bytes; see `Checkpoint.read_bytes`. Each call merges anew.

        Args:
            name: A key of `tensors`.
            start: First byte, counted from the start of the tensor.
            length: Number of bytes; cut at the end of the tensor. None reads to the end.
            out: Writable memory of at least that many bytes to read into, instead of new memory.

        Returns:
            The bytes read.
        """
        if name not in self._updates:
            return self._base.read_bytes(name, start, length, out)
        nbytes = self.tensors[name].nbytes
        stop = nbytes if length is None else min(start + length, nbytes)
        return copy_block(self.read(name), start, stop, out)

    def hashes(self) -> dict[str, str]:
        """Compute the SHA-256 of the base's weight files and of the adapter's two files.

        Returns:
            Relative path to hexadecimal digest; the adapter's paths begin with `+`.
        """
        root = self._adapter.root
        names = ("adapter_config.json", *(file.file for file in self._adapter.weight_files))
        return self._base.hashes() | {f"+{root.name}/{name}": file_hash(root / name) for name in names}

    def side_files(self) -> list[Path]:
        """List the base's files that should travel to a checkpoint made like this one."""
        return self._base.side_files()


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is malformed", "expected a table", "copy the adapter again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"adapter {path.parent} is of type {kind}", "only LORA is merged here", _merge_first(path))
    unsupported = [f"{key}={json.dumps(config[key])}" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']}")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']}")
    if unsupported:
        raise InputError(
            f"adapter {path.parent} is more than plain LoRA",
            f"it has {', '.join(unsupported)}",
            _merge_first(path),
        )
    return config


def _merge_first(path: Path) -> str:
    return f"merge {path.parent.name} with PEFT's merge_and_unload and give the merged model"


def _plan_updates(base: Checkpoint, adapter: Checkpoint, config: Mapping[str, Any]) -> dict[str, _Update]:
    file = adapter.root / adapter.weight_files[0].file
    factors: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for key in adapter.tensors:
        match = _FACTOR.fullmatch(key)
        if match:
            factors.setdefault(match["module"], {})[match["kind"].removeprefix("lora_")] = key
        else:
            others.append(key)
    # PEFT saves the frozen weight of a targeted embedding beside its factors, and loads it over the base's.
    base_layers = {module: f"{module}.base_layer.weight" for module in factors}
    unknown = sorted(set(others) - set(base_layers.values()))
    if unknown or not factors:
        found = f"tensor {unknown[0]!r}" if unknown else "no lora_A and lora_B at all"
        raise InputError(f"{file} is more than plain LoRA", f"found {found}", _merge_first(file))

    updates: dict[str, _Update] = {}
    aliases: dict[str, str] | None = None
    for module, pair in factors.items():
        path = module.removeprefix("base_model.model.")
        wanted = f"{path}.weight"
        matches = _match(wanted, base.tensors)
        if not matches:
            aliases = _aliases(base) if aliases is None else aliases
            matches = [aliases[alias] for alias in _match(wanted, aliases)]
        if len(matches) != 1:
            got = f"{len(matches)} tensors fit, among them {matches[:2]}" if matches else "no tensor fits"
            raise InputError(
                f"cannot place module {path!r} of adapter {file} in {base.spec}",
                f"expected one tensor named like {wanted!r}, {got}",
                "use the base model the adapter was trained on",
            )
        (name,) = matches
        if name in updates:
            raise InputError(f"{file} changes tensor {name!r} twice", f"again through {module!r}", _merge_first(file))
        is_embedding = "embedding_A" in pair
        kinds = {"embedding_A", "embedding_B"} if is_embedding else {"A", "B"}
        if set(pair) != kinds:
            raise InputError(f"{file} is incomplete", f"module {module!r} has only {sorted(pair)}", "copy it again")
        factor_a, factor_b = (pair[kind] for kind in sorted(kinds))
        stored = base_layers[module]
        updates[name] = _Update(
            factor_a,
            factor_b,
            _scaling(config, path, adapter.tensors[factor_a].shape[0], file),
            is_embedding,
            stored if stored in adapter.tensors else None,
        )
    return updates


def _match(wanted: str, names: Iterable[str]) -> list[str]:
    # Either side may carry a prefix for the model inside its head ("bert."), or the component ("unet/").
    if wanted in names:
        return [wanted]
    return [
        name
        for name in names
        if name.endswith((f".{wanted}", f"/{wanted}")) or wanted.endswith(f".{name.rpartition('/')[2]}")
    ]


def _aliases(base: Checkpoint) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix in {info.file[: info.file.rfind("/") + 1] for info in base.tensors.values()}:
        names = [name.removeprefix(prefix) for name in base.tensors if name.startswith(prefix)]
        renamed = names_in_memory(base.root / prefix, names)
        found |= {prefix + name: prefix + stored for name, stored in renamed.items()}
    return found


def _scaling(config: Mapping[str, Any], module: str, rank: int, file: Path) -> float:
    expected = _pattern(config.get("rank_pattern"), module, config.get("r"))
    if rank != expected:
        raise InputError(
            f"{file} does not fit its adapter_config.json",
            f"module {module!r} has rank {rank}, expected {expected}",
            "copy the adapter again",
        )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise InputError(f"{file.parent} has no lora_alpha", f"got {alpha!r}", "copy the adapter again")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # The keys are regular expressions for the end of a module's name.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
