"""Several merged checkpoints as one base, a few factors and what rounding left over, without losing a bit.

| module | what it knows |
| --- | --- |
| `prediction` | the arithmetic that a model is predicted by, the same on every machine |
| `codec` | tensors to bytes and back |
| `archive` | the file: a zip archive of zstd frames |
| `manifest` | what is in it, as JSON |
| `layout` | a checkpoint's files: where tensors lie in them, and what else there is |
| `packer`, `unpacker` | the two directions |
"""

from detune.packing.packer import PackReport, pack
from detune.packing.unpacker import UnpackReport, unpack

__all__ = ["PackReport", "UnpackReport", "pack", "unpack"]
