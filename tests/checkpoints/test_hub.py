"""Models on the Hub, served by this machine: what is downloaded, what is read in part, and what goes wrong."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.hub_server import Hub
from detune.checkpoints import Checkpoint, Excerpt, open_checkpoint
from detune.errors import InputError
from tests.families import plain_family, shard

NAMES = ("org/model-0", "org/model-1", "org/model-2")


@pytest.fixture
def repositories(hub: Hub) -> list[Path]:
    return list(plain_family(hub.root / "org").models)


def header_bytes(checkpoint: Checkpoint) -> int:
    return sum(len(file.header or b"") for file in checkpoint.weight_files)


def snapshot_files(cache: Path, name: str) -> set[str]:
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return {path.relative_to(folder).parts[-1] for path in folder.rglob("*") if path.is_file()}


class TestDownloaded:
    def test_what_a_loader_would_read(self, hub: Hub, repositories: list[Path], hub_cache: Path) -> None:
        torch.save({"w": torch.ones(1)}, repositories[0] / "pytorch_model.bin")
        shutil.copy(repositories[0] / "model.safetensors", repositories[0] / "model.fp16.safetensors")
        (repositories[0] / "README.md").write_text("about")
        checkpoint = open_checkpoint(f"{NAMES[0]}@main")
        expected = load_file(repositories[0] / "model.safetensors")
        assert all(checkpoint.read(name).equal(expected[name]) for name in expected)
        assert snapshot_files(hub_cache, NAMES[0]) == {"README.md", "config.json", "model.safetensors"}
        assert list(hub.sent) == [f"{NAMES[0]}/model.safetensors"]

    def test_a_file_that_two_repositories_share_comes_once(
        self, hub: Hub, repositories: list[Path], hub_cache: Path
    ) -> None:
        """As a family of diffusers pipelines shares its text encoder."""
        for path in repositories[:2]:
            (path / "model_index.json").write_text('{"unet": ["a", "b"], "vae": ["a", "b"]}')
            (path / "unet").mkdir()
            (path / "model.safetensors").rename(path / "unet" / "model.safetensors")
            (path / "vae").mkdir()
            save_file({"w": torch.arange(64.0)}, path / "vae" / "model.safetensors")
        first, second = (open_checkpoint(name) for name in NAMES[:2])
        size = (repositories[0] / "vae" / "model.safetensors").stat().st_size
        assert hub.sent.get(f"{NAMES[0]}/vae/model.safetensors") == size
        assert f"{NAMES[1]}/vae/model.safetensors" not in hub.sent
        assert f"{NAMES[1]}/unet/model.safetensors" in hub.sent
        assert not second.read("unet/layer.0.weight").equal(first.read("unet/layer.0.weight"))
        # Each repository has its own: the other one can be deleted.
        shutil.rmtree(hub_cache / "models--org--model-0")
        assert open_checkpoint(NAMES[1]).read("vae/w").equal(torch.arange(64.0))

    def test_without_a_network_from_the_cache(
        self, hub: Hub, repositories: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_checkpoint(NAMES[0])
        open_checkpoint(NAMES[1], rows=64)  # leaves its small files
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for rows in (None, 64):
            assert open_checkpoint(NAMES[0], rows=rows).read("norm.weight").shape == (64,)
        for name in NAMES[1:]:
            with pytest.raises(InputError, match=rf"'{name}' .* cannot be fetched from the Hub; OfflineModeIsEnabled"):
                open_checkpoint(name)


class TestReadInPart:
    def test_rows_by_range_requests(self, hub: Hub, repositories: list[Path], hub_cache: Path) -> None:
        checkpoint = open_checkpoint(NAMES[0], rows=8)
        assert hub.sent_bytes == header_bytes(checkpoint)
        expected = load_file(repositories[0] / "model.safetensors")["layer.1.weight"]
        # Runs of two rows, from the first to the last of 80: 72 rows left out in three gaps.
        picked = [0, 1, 26, 27, 52, 53, 78, 79]
        assert checkpoint.read("layer.1.weight").equal(expected[picked])
        assert checkpoint.tensors["layer.1.weight"].shape == (80, 64)
        assert hub.sent_bytes == header_bytes(checkpoint) + 8 * 64 * 4
        assert snapshot_files(hub_cache, NAMES[0]) == {"config.json"}

    def test_of_shards(self, hub: Hub, repositories: list[Path]) -> None:
        shard(repositories[0])
        remote, local = open_checkpoint(NAMES[0], rows=8), open_checkpoint(repositories[0], rows=8)
        assert list(remote.tensors.values()) == list(local.tensors.values())
        assert all(remote.read(name).equal(local.read(name)) for name in local.tensors)
        assert remote.hashes() == open_checkpoint(repositories[0]).hashes()

    def test_pickles_are_downloaded(self, hub: Hub, repositories: list[Path]) -> None:
        state = load_file(repositories[0] / "model.safetensors")
        (repositories[0] / "model.safetensors").unlink()
        torch.save(state, repositories[0] / "pytorch_model.bin")
        checkpoint = open_checkpoint(NAMES[0], rows=64)
        assert checkpoint.read("layer.0.weight").shape == (64, 64)
        assert hub.sent_bytes == (repositories[0] / "pytorch_model.bin").stat().st_size

    def test_what_is_in_the_cache_is_not_fetched(self, hub: Hub, repositories: list[Path]) -> None:
        open_checkpoint(NAMES[0])
        before = hub.sent_bytes
        checkpoint = open_checkpoint(NAMES[0], rows=64)
        assert isinstance(checkpoint, Excerpt)
        checkpoint.read("layer.0.weight")
        assert hub.sent_bytes == before

    def test_equal_files_are_known_without_reading(self, hub: Hub, repositories: list[Path]) -> None:
        shutil.copy(repositories[0] / "model.safetensors", repositories[1])
        first, second, other = (open_checkpoint(name, rows=64) for name in NAMES)
        before = hub.sent_bytes
        key = first.content_key("layer.0.weight")
        assert key is not None
        assert key == second.content_key("layer.0.weight")
        assert key not in (other.content_key("layer.0.weight"), first.content_key("layer.1.weight"))
        assert hub.sent_bytes == before
        assert open_checkpoint(repositories[0]).content_key("layer.0.weight") is None


class TestRefused:
    @pytest.mark.parametrize("rows", [None, 64])
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("org/none", r"'org/none' is not an existing path, and the Hub shows no such .*; if it is private, log in"),
            ("org/model-0@v9", r"'org/model-0' has no revision 'v9' on the Hub; .*give a branch, a tag or a commit"),
            ("org/model-1", r"'org/model-1' is gated on the Hub; .*accept its terms on its page, and log in"),
        ],
    )
    def test_what_is_not_to_be_had(
        self, hub: Hub, repositories: list[Path], spec: str, message: str, rows: int | None
    ) -> None:
        hub.gated.add("org/model-1")
        with pytest.raises(InputError, match=message):
            open_checkpoint(spec, rows=rows)

    def test_a_server_that_knows_no_ranges(self, hub: Hub, repositories: list[Path]) -> None:
        hub.takes_ranges = False
        with pytest.raises(
            InputError,
            match=r"the server of org/model-0/model\.safetensors does not answer range requests; "
            r"got \d+ bytes, expected the 8 asked for; download the whole with --rows all",
        ):
            open_checkpoint(NAMES[0], rows=64)

    def test_a_connection_that_breaks_off(
        self, hub: Hub, repositories: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        checkpoint = open_checkpoint(NAMES[0], rows=64)
        checkpoint.read("layer.0.weight")
        hub.drops_after = hub.sent_bytes + 100
        with pytest.raises(
            InputError,
            match=r"cannot read tensor 'layer\.1\.weight' of org/model-0/model\.safetensors from the Hub; "
            r".*; try again, or download it with `hf download org/model-0`",
        ):
            checkpoint.read("layer.1.weight")
        hub.drops_after = None
        assert checkpoint.read("layer.1.weight").shape == (64, 64)

    @pytest.mark.parametrize("rows", [None, 64])
    def test_without_what_lets_others_in(
        self, hub: Hub, repositories: list[Path], monkeypatch: pytest.MonkeyPatch, rows: int | None
    ) -> None:
        """The Hub sends clients to storage by addresses that hold a signature, and errors tell these."""
        monkeypatch.setenv("HF_TOKEN", "hf_notforyoureyes")

        def refuse(*_: object, **__: object) -> None:
            raise OSError("403 of https://ada:pw@cdn.example/a/b?Expires=9&Signature=abc for hf_notforyoureyes")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        monkeypatch.setattr("huggingface_hub.HfFileSystem.cat_file", refuse)
        with pytest.raises(InputError, match=r"; OSError: 403 of https://cdn\.example/a/b\?\.\.\. for \.\.\.; "):
            open_checkpoint(NAMES[0], rows=rows)

    def test_a_damaged_file(self, hub: Hub, repositories: list[Path]) -> None:
        with (repositories[0] / "model.safetensors").open("ab") as file:
            file.write(b"more")
        with pytest.raises(InputError, match=r"org/model-0/model\.safetensors has bytes no tensor owns"):
            open_checkpoint(NAMES[0], rows=64)
