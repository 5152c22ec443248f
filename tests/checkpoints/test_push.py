"""Models and adapters pushed to a Hub on this machine: what arrives, who sees it, and what is refused."""

import json
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import detune
from benchmarks.hub_server import Hub
from detune.checkpoints import open_checkpoint, what_to_push
from detune.cli.signals import Interrupted
from detune.errors import InputError, OutputError
from tests.families import Fine, plain_family, plain_state, save_plain, shard, tree
from tests.schemas import require_valid

# The client's own way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_notforyoureyes"


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The stand-in speaks Git LFS, as the client does where it has no Xet.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    # Retries wait.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    return hub


@pytest.fixture
def fine(tmp_path: Path) -> Fine:
    return plain_family(tmp_path / "models")


@pytest.fixture
def recovered(fine: Fine, tmp_path: Path) -> Path:
    (fine.models[0] / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    detune.recover(fine.models, tmp_path / "recovered", "mean")
    return tmp_path / "recovered"


def save_adapter(folder: Path, base: str) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"a": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def on_hub(hub: Hub, name: str) -> dict[str, bytes]:
    return {path: content for path, content in tree(hub.root / name).items() if path != ".gitattributes"}


class TestWhatArrives:
    def test_a_recovery_with_its_card_privately(self, writable: Hub, recovered: Path) -> None:
        (recovered / "id_rsa").write_text("key")
        (recovered / ".git").mkdir()
        pushed = detune.push(recovered, "org/base")
        names = {"README.md", "README.model-0.md", "config.json", "detune.json", "model.safetensors"}
        assert on_hub(writable, "org/base") == {name: (recovered / name).read_bytes() for name in names}
        assert (pushed.private, pushed.kind, pushed.files) == (True, "model", 5)
        assert pushed.left_out == (".git", "id_rsa")
        assert pushed.total_bytes == sum((recovered / name).stat().st_size for name in names)
        assert writable.private == {"org/base"}
        ((message, paths),) = writable.commits["org/base"]
        assert (message, set(paths)) == (f"Upload with detune {detune.__version__}", names)
        assert pushed.commit == writable.commit("org/base")
        assert open_checkpoint("org/base").read("norm.weight").shape == (64,)

    def test_publicly_where_that_is_said(self, writable: Hub, recovered: Path) -> None:
        pushed = detune.push(recovered, "me/base", public=True, message="mine")
        assert not pushed.private
        assert not writable.private
        assert writable.commits["me/base"][0][0] == "mine"

    def test_adapters_together_and_one_by_one(self, writable: Hub, fine: Fine, tmp_path: Path) -> None:
        detune.extract(fine.models, tmp_path / "loras", base=fine.base)
        assert detune.push(tmp_path / "loras", "org/loras").kind == "adapters"
        assert on_hub(writable, "org/loras") == tree(tmp_path / "loras")
        assert detune.push(tmp_path / "loras" / "model-1", "org/one").kind == "adapter"
        assert set(on_hub(writable, "org/one")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    def test_all_of_a_pipelines_model_or_those_of_a_component(self, writable: Hub, tmp_path: Path) -> None:
        for folder in ("unet", "text_encoder"):
            save_adapter(tmp_path / "model-0" / folder, f"../../base/{folder}")
        (tmp_path / "model-0" / "README.md").write_text("about")
        (tmp_path / "model-0" / "id_rsa").write_text("key")
        pushed = detune.push(tmp_path / "model-0", "org/both")
        assert (pushed.kind, pushed.left_out) == ("adapter", ("id_rsa",))
        assert on_hub(writable, "org/both") == {
            name: content for name, content in tree(tmp_path / "model-0").items() if name != "id_rsa"
        }
        assert detune.push(tmp_path / "model-0" / "unet", "org/one").kind == "adapter"
        assert set(on_hub(writable, "org/one")) == {"adapter_config.json", "adapter_model.safetensors"}

    def test_a_recovery_with_adapters_moved_into_it_is_a_model(
        self, writable: Hub, fine: Fine, recovered: Path
    ) -> None:
        detune.extract(fine.models, recovered / "loras", base=fine.base)
        pushed = detune.push(recovered, "org/base")
        assert (pushed.kind, pushed.left_out) == ("model", ("loras",))

    def test_any_model_without_what_lies_beside_it(self, writable: Hub, fine: Fine) -> None:
        model = fine.models[0]
        shard(model)
        (model / "optimizer.pt").write_bytes(b"x")
        detune.push(model, "org/model")
        assert set(on_hub(writable, "org/model")) == {path for path in tree(model) if path != "optimizer.pt"}

    def test_what_the_hub_has_is_not_sent_again(self, writable: Hub, recovered: Path) -> None:
        writable.refuses_uploads = True
        with pytest.raises(OutputError, match=r"cannot push to 'org/base'; .*"):
            detune.push(recovered, "org/base")
        assert on_hub(writable, "org/base") == {}
        writable.refuses_uploads = False
        detune.push(recovered, "org/base")
        again = detune.push(recovered, "org/base")
        assert writable.uploads == 1
        assert len(writable.commits["org/base"]) == 1
        assert again.commit == writable.commit("org/base")
        (recovered / "README.md").write_text("---\nlicense: mit\n---\nbetter\n")
        detune.push(recovered, "org/base")
        assert writable.commits["org/base"][1][1] == ["README.md"]


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path: None, r"cannot push .*; there is no such directory; give what recover or extract made"),
            (lambda path: path.write_text("x"), r"cannot push .*; it is a file, expected a directory"),
            (lambda path: path.mkdir(), r"holds no weights; .*give the directory of a model"),
            (
                lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")),
                r"is no whole adapter; it lacks",
            ),
            (lambda path: save_adapter(path / "run-7", "org/base"), r"holds no weights"),
            (lambda path: (path.mkdir(), (path / "detune.json").write_text("[]")), r"holds no weights"),
        ],
    )
    def test_what_is_no_model(self, writable: Hub, tmp_path: Path, make, message: str) -> None:
        make(tmp_path / "thing")
        with pytest.raises(InputError, match=message):
            detune.push(tmp_path / "thing", "org/base")
        assert writable.seen == []

    def test_what_is_not_finished_or_not_whole(
        self, writable: Hub, fine: Fine, recovered: Path, tmp_path: Path
    ) -> None:
        (recovered / "config.json").unlink()
        with pytest.raises(InputError, match=r"recovered is not whole; config.json of the recovery is missing"):
            detune.push(recovered, "org/base")
        with (recovered / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(InputError, match=r"model.safetensors is truncated"):
            detune.push(recovered, "org/base")
        assert writable.seen == []

    def test_a_report_of_adapters_without_any(self, writable: Hub, recovered: Path) -> None:
        (recovered / "detune.json").write_text('{"format": "detune-extract/1"}')
        with pytest.raises(InputError, match=r"recovered holds no adapters; detune.json speaks of some; extract them"):
            detune.push(recovered, "org/base")
        assert writable.seen == []

    def test_a_link_out_of_the_model(self, writable: Hub, recovered: Path) -> None:
        (recovered / "README.md").unlink()
        (recovered / "README.md").symlink_to("/etc/hostname")
        with pytest.raises(InputError, match=r"README.md is a link out of the model"):
            detune.push(recovered, "org/base")

    @pytest.mark.parametrize("name", ["base", "org/base@main", "org/a/b", "../base", ""])
    def test_what_is_no_repository(self, writable: Hub, recovered: Path, name: str) -> None:
        with pytest.raises(InputError, match=r" is no repository; expected org/name or user/name; check the spelling"):
            detune.push(recovered, name)

    def test_a_repository_that_others_see(self, writable: Hub, recovered: Path) -> None:
        (writable.root / "org" / "open").mkdir(parents=True)
        with pytest.raises(OutputError, match=r"org/open is public on the Hub; --public was not given; give --public"):
            detune.push(recovered, "org/open")
        (writable.root / "org" / "closed").mkdir()
        writable.private.add("org/closed")
        with pytest.raises(OutputError, match=r"org/closed is private on the Hub; --public makes new .* changes none"):
            detune.push(recovered, "org/closed", public=True)
        assert writable.commits == {}

    def test_a_repository_with_other_files(self, writable: Hub, recovered: Path) -> None:
        save_plain(writable.root / "org" / "model", plain_state())
        writable.private.add("org/model")
        (writable.root / "org" / "model" / "model-00001-of-00002.safetensors").touch()
        with pytest.raises(OutputError, match=r"org/model has other files; 'model-00001-of-.* is not in"):
            detune.push(recovered, "org/model")

    def test_without_a_token_or_with_another(self, writable: Hub, recovered: Path, monkeypatch) -> None:
        with pytest.raises(OutputError, match=r"cannot make 'else/base'; the token is of me, org; log in with"):
            detune.push(recovered, "else/base")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(
            OutputError, match=r"cannot push to 'org/base'; the Hub answered 401; log in with"
        ) as raised:
            detune.push(recovered, "org/base")
        assert "hf_wrong" not in str(raised.value)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(recovered / "none"))
        with pytest.raises(OutputError, match=r"cannot push to 'org/base'; there is no token for the Hub; log in with"):
            detune.push(recovered, "org/base")

    def test_without_a_network(self, writable: Hub, recovered: Path, monkeypatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OutputError, match=r"cannot push to 'org/base'; Offline.*; check the connection and HF"):
            detune.push(recovered, "org/base")


class TestFromTheCommandLine:
    def test_push(self, command, writable: Hub, recovered: Path) -> None:
        (recovered / "notes.txt").write_text("mine")
        ran = command("push", recovered, "org/base")
        assert (ran.code, ran.err) == (0, "")
        assert "not pushed, as no loader reads it: notes.txt" in ran.out
        assert "(private): 5 files, 0.1 MB" in ran.out
        shown = require_valid("push", command("push", recovered, "org/base", "--json").out)
        assert (shown["repository"], shown["private"], shown["files"]) == ("org/base", True, 5)

    def test_recover_and_extract_push_what_they_made(self, command, writable: Hub, fine: Fine, tmp_path: Path) -> None:
        ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--method", "mean", "--push", "org/base")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.splitlines()[-1].startswith("pushed model to http://127.0.0.1")
        assert ModelCard.load(writable.root / "org" / "base" / "README.md").data.tags == ["detune", "weight-recovery"]
        words = ["extract", *fine.specs, "--base", fine.base, "--out", tmp_path / "loras", "--push", "org/loras"]
        assert command(*words, "--public").code == 0
        assert on_hub(writable, "org/loras") == tree(tmp_path / "loras")
        assert writable.private == {"org/base"}

    def test_what_the_hub_would_refuse_is_said_before_anything_is_computed(
        self, command, writable: Hub, fine: Fine, tmp_path: Path
    ) -> None:
        ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--push", "else/base")
        assert ran.code == 2
        assert "the token is of me, org" in ran.err
        assert not (tmp_path / "out").exists()
        ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--public")
        assert ran.code == 2
        assert "give --push REPO as well" in ran.err

    def test_a_push_that_fails_says_that_the_work_is_done(
        self, command, writable: Hub, fine: Fine, tmp_path: Path
    ) -> None:
        writable.refuses_uploads = True
        ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--method", "mean", "--push", "org/base")
        assert ran.code == 2
        assert len(ran.err.splitlines()) == 1
        assert ran.err.endswith("out is finished: `detune push` takes it from there\n")
        assert (tmp_path / "out" / "detune.json").exists()

    def test_a_push_that_is_interrupted_says_so_too(
        self, command, writable: Hub, fine: Fine, tmp_path: Path, monkeypatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise Interrupted(signal.SIGINT)

        monkeypatch.setattr(detune, "push", interrupt)
        monkeypatch.setattr("detune.cli.leave", sys.exit)
        ran = command("recover", *fine.specs, "--out", tmp_path / "out", "--method", "mean", "--push", "org/base", "-q")
        assert (ran.code, ran.out) == (130, "")
        assert ran.err.endswith("out is finished: `detune push` takes it from there\n")
        assert (tmp_path / "out" / "detune.json").exists()

    @pytest.mark.parametrize("fails", [False, True])
    def test_no_token_and_no_signature_in_any_output(
        self, command, writable: Hub, recovered: Path, fails: bool, caplog
    ) -> None:
        writable.refuses_uploads = fails
        with caplog.at_level(logging.DEBUG):
            ran = command("-vv", "push", recovered, "org/base", *["--json"] * (not fails))
        assert ran.code == (2 if fails else 0)
        assert any("lfs" in line for line in writable.seen)
        for said in (ran.out, ran.err, caplog.text):
            assert TOKEN not in said
            assert "signed" not in said


def test_what_would_be_pushed_is_known_without_a_network(recovered: Path) -> None:
    found = what_to_push(recovered)
    assert list(found.files) == ["README.md", "README.model-0.md", "config.json", "detune.json", "model.safetensors"]
    assert found.total_bytes == sum(path.stat().st_size for path in recovered.iterdir())
