"""Causal language models, by the texts they write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detune._runtime import global_seed, needs_extra, quiet
from detune.bench.behaviour.base import Differences
from detune.bench.behaviour.loading import load, loading
from detune.checkpoints import load_pretrained

__all__ = ["WrittenTexts"]

Texts = tuple[str, ...]


@dataclass(frozen=True)
class WrittenTexts:
    """Continuations that a causal language model samples for each prompt, from the same seed.

    The settings of sampling are the paper's, and as in its script a text begins with its prompt. The model runs in
    float32 rather than the script's bfloat16, in which models that are nearly equal differ by rounding.

    Attributes:
        tokenizer_dir: The model whose tokenizer is used for both: the original.
        prompts: What the texts begin with.
        new_tokens: Tokens after the prompt; fewer where the model ends the text.
        temperature: The logits are divided by this.
        top_k: Only this many of the likeliest tokens are drawn from.
        top_p: Only the likeliest of these that together have this probability.
        seed: Seed of the sampling.

    Reference:
        Horwitz, Kahana & Hoshen 2024 (arXiv 2402.10208), appendix.
    """

    tokenizer_dir: Path
    prompts: tuple[str, ...]
    new_tokens: int = 50
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0

    def observe(self, model_dir: Path) -> Texts:
        """Return each prompt with what the model writes after it; see `Behaviour.observe`.

        Args:
            model_dir: The model to run.

        Raises:
            InputError: The model or the tokenizer cannot be read.
            DetuneError: The extra `bench` is not installed.
        """
        with needs_extra("bench"):
            from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet(), torch.no_grad():
            with loading(f"the tokenizer in {self.tokenizer_dir}"):
                tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_dir)
            model = load(AutoModelForCausalLM, model_dir, torch.float32)
            model.generation_config = self._sampling(tokenizer)
            return tuple(self._write(model, tokenizer, prompt) for prompt in self.prompts)

    def compare(self, original: Texts, recovered: Texts) -> Differences:
        """Return `sbert` and `sbert_log10`, distances of the sentences' embeddings, and `equal_texts`, a share.

        Args:
            original: Texts of the original model.
            recovered: Texts of the recovered one.

        Raises:
            DetuneError: The extra `bench` is not installed.
        """
        from detune.metrics.sbert import sbert_distance

        distance = sbert_distance(original, recovered)
        return Differences(
            {"sbert": distance.mean, "sbert_log10": distance.mean_log10, "equal_texts": distance.equal_share}
        )

    def _sampling(self, tokenizer: Any) -> Any:
        """Return the settings of generation; they replace the model's own, which a fine-tune may have changed."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=self.new_tokens,
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    def _write(self, model: Any, tokenizer: Any, prompt: str) -> str:
        # Some tokenizers give token types, which not every model takes.
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with global_seed(self.seed):
            (sequence,) = model.generate(**tokens)
        text: str = tokenizer.decode(sequence, skip_special_tokens=True)
        return text
