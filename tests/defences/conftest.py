"""A small BERT with a tokenizer, and texts that it can read."""

from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from detune._runtime import global_seed, quiet

WORDS = ("a", "base", "model", "leaks", "from", "fine", "tunes", "of", "its", "weights", "when", "three", "are", "out")
TEXTS = tuple(" ".join(WORDS[i % 7 : 3 + i % 11]) for i in range(40))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, with linear layers of 24x24, 40x24 and 24x40."""
    out = tmp_path_factory.mktemp("models") / "bert"
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=80,
    )
    with global_seed(0), quiet():
        BertForMaskedLM(config).save_pretrained(out)
        BertTokenizerFast(vocab=vocabulary).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file
