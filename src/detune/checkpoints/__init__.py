"""Checkpoints on disk: lazy reading, streaming writing, and LoRA adapters, as factors or merged on the fly.

This layer knows files only. Nothing here computes with weights, except for the merge of an adapter.
"""

from detune.checkpoints.adapters import MergedCheckpoint
from detune.checkpoints.atomic import check_new, new_directory, new_file
from detune.checkpoints.blocks import round_to
from detune.checkpoints.excerpt import Excerpt
from detune.checkpoints.lora import Lora, LoraLayer, open_lora
from detune.checkpoints.masks import MaskWriter
from detune.checkpoints.modules import Kind, Place, find_places
from detune.checkpoints.opening import is_on_hub, open_checkpoint
from detune.checkpoints.peft_writer import PeftLayer, PeftWriter, peft_layer
from detune.checkpoints.source import Checkpoint, TensorInfo, WeightFile
from detune.checkpoints.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Excerpt",
    "Kind",
    "Lora",
    "LoraLayer",
    "MaskWriter",
    "MergedCheckpoint",
    "PeftLayer",
    "PeftWriter",
    "Place",
    "TensorInfo",
    "WeightFile",
    "check_new",
    "find_places",
    "is_on_hub",
    "new_directory",
    "new_file",
    "open_checkpoint",
    "open_lora",
    "peft_layer",
    "round_to",
]
