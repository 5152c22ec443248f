"""Checkpoints on disk: lazy reading, streaming writing, and LoRA adapters, as factors or merged on the fly.

This layer knows files only. Nothing here computes with weights, except for the merge of an adapter.
"""

from detune.checkpoints.adapters import MergedCheckpoint
from detune.checkpoints.lora import Lora, LoraLayer, open_lora
from detune.checkpoints.source import Checkpoint, TensorInfo, WeightFile, open_checkpoint
from detune.checkpoints.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Lora",
    "LoraLayer",
    "MergedCheckpoint",
    "TensorInfo",
    "WeightFile",
    "open_checkpoint",
    "open_lora",
]
