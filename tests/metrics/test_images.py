import sys

import numpy as np
import pytest
import torch
from PIL import Image

from detune.errors import DetuneError, InputError
from detune.metrics.images import largest_level_difference, lpips_distance


def noise(seed, count=3, side=20):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def brightness(first, second):
    """A network for tests: the mean absolute difference."""
    return (first - second).abs().mean()


class TestLargestLevelDifference:
    def test_equal_images(self):
        assert largest_level_difference(noise(0), noise(0)) == 0

    @pytest.mark.parametrize(("level", "other"), [(0, 255), (255, 0), (7, 8), (200, 72)])
    def test_one_pixel_counts_and_nothing_wraps_around(self, level, other):
        original, recovered = noise(0), noise(0)
        original[1, 4, 5, 2], recovered[1, 4, 5, 2] = level, other
        assert largest_level_difference(original, recovered) == abs(level - other)

    def test_is_a_plain_int(self):
        assert type(largest_level_difference(noise(0), noise(1))) is int

    def test_arguments_stay_as_they_are(self):
        original, recovered = noise(0), noise(1)
        largest_level_difference(original, recovered)
        np.testing.assert_array_equal(original, noise(0))
        np.testing.assert_array_equal(recovered, noise(1))


@pytest.mark.parametrize("distance", [largest_level_difference, lpips_distance])
class TestWhatCannotBeCompared:
    @pytest.mark.parametrize(
        "images", [noise(0).astype(np.float32), noise(0)[0], noise(0)[..., :1], noise(0)[:0]], ids=lambda a: a.shape
    )
    def test_no_stack_of_rgb_images(self, distance, images):
        with pytest.raises(InputError, match=r"expected uint8 of shape \(n, height, width, 3\)"):
            distance(images, images)

    def test_two_shapes(self, distance):
        with pytest.raises(InputError, match=r"got shapes \(3, 20, 20, 3\) and \(2, 20, 20, 3\), expected one"):
            distance(noise(0), noise(0, count=2))


class TestLpipsWithANetworkOfOnesOwn:
    def test_equal_images(self):
        assert lpips_distance(noise(0), noise(0), network=brightness) == 0.0

    def test_mean_over_the_pairs(self):
        one = [lpips_distance(noise(0)[i : i + 1], noise(1)[i : i + 1], network=brightness) for i in range(3)]
        assert lpips_distance(noise(0), noise(1), network=brightness) == pytest.approx(np.mean(one), rel=1e-12)

    def test_network_sees_one_pair_at_a_time_from_minus_one_to_one(self):
        seen = []
        images = np.stack([np.zeros((10, 10, 3), np.uint8), np.full((10, 10, 3), 255, np.uint8)])
        lpips_distance(images, images[::-1], network=lambda a, b: seen.append((a, b)) or torch.zeros(1, 1, 1, 1))
        assert [(tuple(a.shape), a.dtype) for pair in seen for a in pair] == [((1, 3, 224, 224), torch.float32)] * 4
        assert [(a.unique().item(), b.unique().item()) for a, b in seen] == [(-1, 1), (1, -1)]

    @pytest.mark.parametrize("side", [16, 100, 224, 300])
    def test_resized_as_pillow_does(self, side):
        """To one level: the two round differently where a value lies half-way."""
        seen = []
        images = noise(2, count=1, side=side)
        lpips_distance(images, images, network=lambda a, b: seen.append(a) or torch.zeros(()))
        pillow = Image.fromarray(images[0]).resize((224, 224), Image.Resampling.BILINEAR)
        ours = (seen[0][0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(ours - np.asarray(pillow)).max() < 1.01


class TestWithoutItsPackages:
    def test_lpips_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lpips", None)
        with pytest.raises(DetuneError, match=r"^(import of )?lpips.*; pip install 'detune\[lpips\]'$"):
            lpips_distance(noise(0), noise(0))

    def test_torchvision_is_missing(self, monkeypatch, tmp_path):
        (tmp_path / "lpips.py").write_text("import torchvision", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "lpips", raising=False)
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(DetuneError, match=r"torchvision.* is not installed; pip install 'detune\[lpips\]'$"):
            lpips_distance(noise(0), noise(0))

    def test_torchvision_of_another_torch(self, monkeypatch, tmp_path):
        (tmp_path / "lpips.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "lpips", raising=False)
        with pytest.raises(DetuneError, match=r"torchvision::nms does not exist; .* does not fit torch 2\..*; install"):
            lpips_distance(noise(0), noise(0))

    @pytest.mark.parametrize(
        "error",
        ["OSError", "RuntimeError", "EOFError", "__import__('pickle').UnpicklingError"],
    )
    def test_weights_of_vgg_are_missing_or_damaged_in_one_short_line(self, monkeypatch, tmp_path, error):
        code = f"def LPIPS(**_):\n    raise {error}('no weights\\n\\n' + 'and more\\n' * 50)\n"
        (tmp_path / "lpips.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "lpips", raising=False)
        with pytest.raises(DetuneError, match=r"^LPIPS needs the weights of VGG-16, .*; got: no weights; connect"):
            lpips_distance(noise(0), noise(0))
