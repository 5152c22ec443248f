"""`lpips_distance` with the package itself; `make test-lpips` runs these in an environment that has it."""

import urllib.error

import lpips
import numpy as np
import pytest
import torch
import torchvision

from detune.errors import DetuneError
from detune.metrics.images import lpips_distance

# lpips calls torchvision the way of older releases; where `lpips_distance` builds the network, it is silent.
old_calls = pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained' is deprecated:UserWarning",
    "ignore:Arguments other than a weight enum:UserWarning",
)

GREY = np.full((1, 64, 64, 3), 128, dtype=np.uint8)


def noisy(amplitude):
    noise = np.random.default_rng(0).normal(scale=amplitude, size=GREY.shape)
    return np.clip(GREY + noise, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def random_vgg():
    """LPIPS' own linear layers on a VGG-16 of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.vgg16(weights=None)


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    torch_home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home


@pytest.fixture
def downloads_random_weights(monkeypatch, random_vgg):
    asked = []

    def load(url, *args, **kwargs):
        asked.append(url)
        return random_vgg.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    return asked


class TestTheDefaultNetwork:
    def test_equal_images_are_at_zero_and_noise_at_more(self, downloads_random_weights):
        distances = [lpips_distance(GREY, noisy(amplitude)) for amplitude in (0, 2, 40)]
        assert distances[0] == 0.0
        assert 1e-6 < distances[1] < distances[2] / 2

    @old_calls
    def test_same_as_lpips_itself(self, downloads_random_weights, random_vgg):
        """At 224 pixels nothing is resized."""
        levels = np.random.default_rng(1).integers(0, 256, (2, 1, 224, 224, 3), dtype=np.uint8)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        slices = (network.net.slice1, network.net.slice2, network.net.slice3, network.net.slice4, network.net.slice5)
        state = random_vgg.features.state_dict()
        for part in slices:
            part.load_state_dict({name: state[name] for name in part.state_dict()})
        first, second = (torch.from_numpy(image).permute(0, 3, 1, 2) / 255 for image in levels)
        with torch.no_grad():
            expected = network(first, second, normalize=True).item()
        assert lpips_distance(*levels) == pytest.approx(expected, rel=1e-4)

    def test_the_weights_are_those_of_the_message(self, downloads_random_weights):
        lpips_distance(GREY, GREY)
        assert downloads_random_weights == ["https://download.pytorch.org/models/vgg16-397923af.pth"]

    def test_same_images_same_number(self, downloads_random_weights):
        assert lpips_distance(GREY, noisy(9)) == lpips_distance(GREY, noisy(9))


class TestANetworkOfOnesOwn:
    @old_calls
    def test_needs_no_download(self, no_download):
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        assert lpips_distance(GREY, GREY, network=network) == 0.0
        assert abs(lpips_distance(GREY, noisy(40), network=network)) > 0.0


def test_weights_that_cannot_be_had(no_download):
    message = (
        r"needs the weights of VGG-16.*; got: .*no network.*; "
        rf"connect .*models/vgg16-397923af\.pth to {no_download}/hub/checkpoints$"
    )
    with pytest.raises(DetuneError, match=message):
        lpips_distance(GREY, GREY)
