"""One frozen A for all releases: a defence that has to be there before the training.

With `W_i = W + B_i A` and one A for all models, any X gives `W' = W + X A`, `B_i' = B_i - X` with the same releases:
`W A^+ A`, the part of W in A's row space, is lost to everybody, at any number of models and by any method.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from detune._runtime import global_seed, needs_extra, quiet
from detune.checkpoints import from_out, load_pretrained, new_directory, resolved
from detune.errors import InputError, reason_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FrozenA", "freeze_a"]


@dataclass(frozen=True)
class FrozenA:
    """The adapter that every fine-tune has to start from, with A frozen.

    It cannot be put on afterwards: a merged `W_i = W + B_i A_i` has the row space of its own A_i, and to force it into
    another is to train again or to lose the part outside.

    Attributes:
        rank: LoRA rank r: of every row of W, r of its dimensions are hidden. B alone has as many numbers as A and B of
            an ordinary LoRA of half the rank.
        alpha: The change is `alpha / rank · B A`.
        targets: Names of the linear layers to train, as PEFT's `target_modules`.

    Reference:
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023
        (arXiv 2308.03303): A stays at its random start, without loss; there to save memory.
    """

    name: ClassVar[str] = "frozen-a"
    about: ClassVar[str] = "write the adapter that all fine-tunes of a base must start from, with its A frozen"

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ("query", "value")

    def start(self, base: Path, out: Path, seed: int) -> Path:
        """Write the adapter: A drawn from the seed with orthonormal rows, another for each layer; B = 0.

        Args:
            base: The model, a directory in Hugging Face layout that transformers can load.
            out: The directory to make.
            seed: For A. It is no secret: the releases' differences show A's row space to anybody.

        Returns:
            `out`, a PEFT adapter.

        Raises:
            InputError: The base cannot be loaded, or has no such layers.
            OutputError: `out` exists.
            DetuneError: peft is not installed.
        """
        with needs_extra("demo"):
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModel

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))
        with new_directory(out) as partial, quiet(), global_seed(seed):
            try:
                model = get_peft_model(load_pretrained(AutoModel, base, dtype=torch.float32), config)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"no adapter of {base} with the layers {', '.join(self.targets)}", reason_of(error), "see --targets"
                ) from error
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    if parameter.shape[0] > parameter.shape[1]:
                        raise InputError(
                            f"no {parameter.shape[0]} orthonormal rows fit {name.partition('.lora_A.')[0]!r} of {base}",
                            f"it takes {parameter.shape[1]} inputs, expected at least the rank",
                            f"give --rank {parameter.shape[1]} or less",
                        )
                    parameter.data.copy_(_orthonormal_rows(parameter.shape[0], parameter.shape[1], generator))
            # Named as in every adapter that may be given away; PEFT would look the name up on the Hub otherwise.
            place = from_out(base, resolved(out))
            model.peft_config["default"].base_model_name_or_path = place
            model.save_pretrained(str(partial), save_embedding_layers=False)
            # A card without content, but with the base's place on this machine.
            (partial / "README.md").unlink(missing_ok=True)
        return out


def freeze_a(model: "PeftModel") -> "PeftModel":
    """Take every A of a PEFT model out of the training; B is what is learnt.

    Args:
        model: Loaded from the adapter with `is_trainable=True`.

    Returns:
        The same model.

    Raises:
        InputError: It has no LoRA.

    Example:
        >>> model = PeftModel.from_pretrained(base, "start", is_trainable=True)  # doctest: +SKIP
        >>> trainer = Trainer(freeze_a(model), ...)  # doctest: +SKIP
    """
    frozen = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
    if not frozen:
        raise InputError(
            "a model without a LoRA has no A to freeze",
            f"got {type(model).__name__}, expected a PeftModel",
            "load the adapter with PeftModel.from_pretrained(base, adapter, is_trainable=True)",
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model


def _orthonormal_rows(rank: int, width: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.mT.float()
