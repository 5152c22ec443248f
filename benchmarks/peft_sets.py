"""Sets of fine-tunes of one base by each of PEFT's methods, trained briefly and merged by PEFT itself, float32.

Two bases: one linear layer that learns to be another one, for tests, and all-MiniLM-L6-v2 with the demo's task. All
fine-tunes of a set start from one seed, as fine-tunes of one script do: what a method draws at random, they share.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detune._runtime import global_seed, quiet, use_threads

TARGETS = ("query", "value")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        config: The `PeftConfig` of a fine-tune, by its place in the set.
        lr: AdamW's rate at the first step.
        solver: What `detune recover --method` recovers it by.
        rank: What `--rank` is told; None finds it.
    """

    config: Callable[[int], Any]
    lr: float = 1e-3
    solver: str = "auto"
    rank: int | None = None


def config(name: str, **options: Any) -> Callable[[int], Any]:
    """A configuration that all fine-tunes of a set share; its class by name, so that the table needs no PEFT."""

    def make(model: int) -> Any:
        import peft

        return getattr(peft, name)(target_modules=list(TARGETS), **options)

    return make


def shira(model: int) -> Any:
    """SHiRA with a mask of its own for each fine-tune; without a `random_seed` all of PEFT's masks are the same."""
    return config("ShiraConfig", r=4, random_seed=model)(model)


def fourier(model: int) -> Any:
    """FourierFT with frequencies of its own for each fine-tune."""
    return config("FourierFTConfig", n_frequency=500, random_loc_seed=model)(model)


# Ranks are such that three fine-tunes of a 96x96 matrix can be told apart.
METHODS: dict[str, Method] = {
    "LoRA": Method(config("LoraConfig", r=8, lora_alpha=16)),
    "rsLoRA": Method(config("LoraConfig", r=8, lora_alpha=16, use_rslora=True)),
    "AdaLoRA": Method(config("AdaLoraConfig", init_r=8, target_r=4, total_step=100, tinit=5, tfinal=5), lr=1e-2),
    "DeLoRA": Method(config("DeloraConfig", r=8)),
    "GraLoRA": Method(config("GraloraConfig", r=8, gralora_k=2)),
    "VB-LoRA": Method(config("VBLoRAConfig", r=4, num_vectors=64, vector_length=32), lr=1e-2),
    "PiSSA": Method(config("LoraConfig", r=8, lora_alpha=8, init_lora_weights="pissa"), lr=1e-4),
    "OLoRA": Method(config("LoraConfig", r=8, lora_alpha=8, init_lora_weights="olora"), lr=1e-4),
    "LoHa": Method(config("LoHaConfig", r=3, alpha=3), lr=3e-3),
    "LoKr": Method(config("LoKrConfig", r=4, alpha=4), lr=3e-3, solver="lokr"),
    "LoKr, full factors": Method(config("LoKrConfig", r=64, alpha=64), lr=3e-3, solver="lokr"),
    "HRA": Method(config("HRAConfig", r=8), rank=8),
    "VeRA": Method(config("VeraConfig", r=32, projection_prng_key=0), lr=1e-2, solver="vera"),
    "RandLoRA": Method(config("RandLoraConfig", r=8, randlora_alpha=16, projection_prng_key=0), lr=1e-2),
    "DoRA": Method(config("LoraConfig", r=8, lora_alpha=16, use_dora=True), solver="dora"),
    "HiRA": Method(config("HiraConfig", r=8), lr=1e-2),
    "IA3": Method(config("IA3Config", feedforward_modules=["value"]), lr=1e-2, solver="dora"),
    "RoAd": Method(config("RoadConfig", group_size=32), lr=3e-3),
    "OFT": Method(config("OFTConfig", oft_block_size=16)),
    "BOFT": Method(config("BOFTConfig", boft_block_size=8)),
    "MiSS": Method(config("MissConfig", r=8)),
    "C3A": Method(config("C3AConfig", block_size=16), lr=3e-3),
    "SHiRA": Method(shira, solver="shira"),
    "SHiRA, one mask": Method(config("ShiraConfig", r=4), solver="shira"),
    "FourierFT": Method(config("FourierFTConfig", n_frequency=500), lr=1e-2),
    "FourierFT, own frequencies": Method(fourier, lr=1e-2),
    "full": Method(config("FullConfig"), lr=1e-4),
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the matrices that the methods change, by name."""
    ends = tuple(f"{target}.weight" for target in TARGETS)
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name.endswith(ends)}


def fine_tune(
    base: nn.Module, method: Method, index: int, steps: int, loss: Callable[[nn.Module, int], Tensor]
) -> nn.Module:
    """Train `base` in place by a method, and merge.

    Args:
        base: The model.
        method: How.
        index: The fine-tune's place in its set.
        steps: Updates.
        loss: Of the model at a step.
    """
    import peft

    full = method is METHODS["full"]
    with quiet_peft(), global_seed(0):
        model = base if full else peft.get_peft_model(base, method.config(index))
        model.train()
        if full:
            model.requires_grad_(False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith(tuple(f"{target}.weight" for target in TARGETS)))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=method.lr, weight_decay=0.0)
        for step in range(steps):
            value = loss(model, step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return model.eval() if full else model.eval().merge_and_unload()


@contextlib.contextmanager
def quiet_peft():
    """PEFT's warnings and prints are about its own choices."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class Layers(nn.Module):
    """Two linear layers of some width, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Through both."""
        return self.value(torch.tanh(self.query(x)))


def tiny_set(
    method: Method, count: int, width: int = 96, steps: int = 15
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base of two linear layers and fine-tunes of it, each taught by a base of another seed.

    Returns:
        The base's matrices, and each fine-tune's.
    """
    with global_seed(1):
        truth = weights(Layers(width))
    models = []
    for index in range(count):
        with global_seed(1):
            base = Layers(width)
        models.append(weights(fine_tune(base, method, index, steps, _lesson(100 + index, width))))
    return truth, models


def _lesson(seed: int, width: int) -> Callable[[nn.Module, int], Tensor]:
    """How far a model is from another base."""
    with global_seed(seed):
        teacher, inputs = Layers(width), torch.randn(64, width)
        outputs = teacher(inputs).detach()
    return lambda model, step: F.mse_loss(model(inputs), outputs)


def minilm_set(method: Method, count: int, steps: int = 6) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """all-MiniLM-L6-v2 and fine-tunes of it, each on passages of a subject of its own: the demo's task, fewer steps.

    Returns:
        The base's matrices, and each fine-tune's.
    """
    from transformers import AutoModel, AutoTokenizer

    from detune.demo.texts import DOMAINS, passages
    from detune.demo.train import base_model

    with quiet(), use_threads(1):
        tokenizer = AutoTokenizer.from_pretrained(base_model())

        pristine = AutoModel.from_pretrained(base_model(), dtype=torch.float32)
        truth = weights(pristine)
        models = []
        for index, domain in enumerate(list(DOMAINS)[:count]):
            loss = _cloze(tokenizer, passages(domain))
            models.append(weights(fine_tune(copy.deepcopy(pristine), method, index, steps, loss)))
    return truth, models


def _cloze(tokenizer: Any, texts: list[str]) -> Callable[[nn.Module, int], Tensor]:
    """Which second half of eight passages belongs to which first half."""

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = [texts[(8 * step + i) % len(texts)].split() for i in range(8)]
        halves = [" ".join(words[: len(words) // 2]) for words in batch]
        halves += [" ".join(words[len(words) // 2 :]) for words in batch]
        tokens = tokenizer(halves, padding=True, truncation=True, max_length=24, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        states = model(**tokens).last_hidden_state
        first, second = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).chunk(2)
        return F.cross_entropy(first @ second.T / 0.05, torch.arange(8))

    return loss
