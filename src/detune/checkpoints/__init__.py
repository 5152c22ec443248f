"""Checkpoints on disk or on the Hub: lazy reading, streaming writing, LoRA adapters as factors or merged on the fly.

This layer knows files only. Nothing here computes with weights, except for the merge of an adapter.
"""

from detune.checkpoints.atomic import check_new, new_directory, new_file, require_apart, resolved
from detune.checkpoints.blocks import round_to
from detune.checkpoints.disk import reported
from detune.checkpoints.excerpt import Excerpt
from detune.checkpoints.hub import is_on_hub
from detune.checkpoints.identity import identity
from detune.checkpoints.lora import Lora, LoraLayer, open_lora
from detune.checkpoints.mark import write_mark
from detune.checkpoints.masks import pack_mask, write_masks
from detune.checkpoints.merged_checkpoint import MergedCheckpoint
from detune.checkpoints.modules import Kind, Place, find_places
from detune.checkpoints.opening import absolute, open_checkpoint
from detune.checkpoints.paths import folded, inside, plain_name
from detune.checkpoints.peft_writer import PeftLayer, PeftPlaces, PeftWriter, pack_layers, peft_layer, unpack_layers
from detune.checkpoints.pretrained import load_pretrained, model_class_of
from detune.checkpoints.private_paths import PrivatePaths, from_out
from detune.checkpoints.push import Publication, Pushed, check_repository, push, what_to_push
from detune.checkpoints.quantised import Decoded
from detune.checkpoints.run_directory import Noted, RunDirectory, claim, noted_results, remove_spent
from detune.checkpoints.source import Checkpoint, TensorInfo, WeightFile
from detune.checkpoints.staging import remove_abandoned, temporary_directory
from detune.checkpoints.target import Target, require_outside
from detune.checkpoints.unmerged import Unmerged
from detune.checkpoints.view import Part, View, own_name, raw
from detune.checkpoints.writer import CheckpointFiles, CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointFiles",
    "CheckpointWriter",
    "Decoded",
    "Excerpt",
    "Kind",
    "Lora",
    "LoraLayer",
    "MergedCheckpoint",
    "Noted",
    "Part",
    "PeftLayer",
    "PeftPlaces",
    "PeftWriter",
    "Place",
    "PrivatePaths",
    "Publication",
    "Pushed",
    "RunDirectory",
    "Target",
    "TensorInfo",
    "Unmerged",
    "View",
    "WeightFile",
    "absolute",
    "check_new",
    "check_repository",
    "claim",
    "find_places",
    "folded",
    "from_out",
    "identity",
    "inside",
    "is_on_hub",
    "load_pretrained",
    "model_class_of",
    "new_directory",
    "new_file",
    "noted_results",
    "open_checkpoint",
    "open_lora",
    "own_name",
    "pack_layers",
    "pack_mask",
    "peft_layer",
    "plain_name",
    "push",
    "raw",
    "remove_abandoned",
    "remove_spent",
    "reported",
    "require_apart",
    "require_outside",
    "resolved",
    "round_to",
    "temporary_directory",
    "unpack_layers",
    "what_to_push",
    "write_mark",
    "write_masks",
]
