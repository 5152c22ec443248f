"""Models that carry Python code: it is never run, and nobody is asked whether to."""

import ast
import io
import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import detune
from detune.checkpoints import load_pretrained
from tests.command import run_command
from tests.families import Fine, fine_tune

SOURCE = Path(detune.__file__).parent
COMMANDS = {
    "recover": ["recover", "{models}", "--adapters", "{out}/adapters", "--out", "{out}/recovered"],
    "extract": ["extract", "{models}", "--base", "{base}", "--out", "{out}/extracted"],
    "inspect": ["inspect", "{base}+{adapter}", "{models}"],
    "audit": ["audit", "{models}", "--base", "{base}", "--out", "{out}/audit"],
    "noise": ["defend", "noise", "{base}", "{out}/noise"],
    "permutation": ["defend", "permutation", "{base}", "{out}/permutation"],
    "quiet-noise": ["defend", "quiet-noise", "{base}", "{out}/quiet", "--texts", "{texts}"],
    "frozen-a": ["defend", "frozen-a", "{base}", "{out}/start"],
}


@pytest.fixture(scope="module", params=["bert", "of-its-own"])
def armed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """A family, of a type that transformers knows and of one that it does not; each model would leave a mark."""
    folder = tmp_path_factory.mktemp(f"armed-{request.param}")
    config = BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=80)
    fine = fine_tune(BertModel(config), ["query", "value"], folder)
    code = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    names = {
        "configuration_x": ("AutoConfig", "XConfig"),
        "modeling_x": ("AutoModel", "XModel"),
        "tokenization_x": ("AutoTokenizer", "XTokenizer"),
        "image_processing_x": ("AutoImageProcessor", "XProcessor"),
    }
    auto_map = {auto: f"{module}.{name}" for module, (auto, name) in names.items()}
    for model in (fine.base, *fine.models):
        for module, (auto, name) in names.items():
            library = "PretrainedConfig" if auto == "AutoConfig" else "PreTrainedModel"
            text = f"{code}from transformers import {library}\nclass {name}({library}): model_type = 'of-its-own'\n"
            (model / f"{module}.py").write_text(text)
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            path = model / file
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | {"auto_map": auto_map, "model_type": request.param}))
    return fine


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_code_of_a_model_is_never_run(armed, command, tmp_path, monkeypatch, capsys) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n")
    adapter = armed.base.parent / "loras" / "model-0"
    if not adapter.exists():
        detune.extract(armed.specs, adapter.parent, base=armed.base)
    places = {"base": armed.base, "out": tmp_path, "adapter": adapter, "texts": texts}
    words = [
        spec for word in COMMANDS[command] for spec in (armed.specs if word == "{models}" else [word.format(**places)])
    ]
    answers = io.StringIO("y\n" * 100)
    monkeypatch.setattr("sys.stdin", answers)
    ran = run_command(monkeypatch, capsys, *words)
    assert not (armed.base.parent / "ran").exists()
    assert answers.tell() == 0, "somebody was asked"
    assert "Do you wish" not in ran.out + ran.err
    assert ran.code == (command == "audit") or (ran.code == 2 and ran.err.startswith("detune: error: "))


def test_models_are_loaded_in_one_place() -> None:
    """Every `from_pretrained` of transformers and diffusers goes through `load_pretrained`, which trusts no code."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                # From no directory at all nothing can be run.
                if [ast.unparse(argument) for argument in node.args[:1]] == ["None"]:
                    continue
                if node.func.attr in ("from_pretrained", "get_class_from_dynamic_module") and owner != "PeftModel":
                    found.append(f"{file.relative_to(SOURCE)}: {owner}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False"
    assert found == ["checkpoints/pretrained.py: factory"]


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "StableDiffusionPipeline", "scheduler": ["evil", "X"]},
        {"_class_name": ["evil", "X"], "scheduler": ["diffusers", "DDIMScheduler"]},
        {"_class_name": "StableDiffusionPipeline", "scheduler": ["antigravity", "X"]},
    ],
)
def test_a_pipeline_names_no_library_of_its_own(tmp_path, monkeypatch, index) -> None:
    """Whatever the installed version of diffusers would do: it is not asked."""
    from diffusers import StableDiffusionPipeline

    (tmp_path / "scheduler").mkdir()
    for file in ("evil.py", "scheduler/evil.py"):
        (tmp_path / file).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("diffusers is asked"))
    with pytest.raises(detune.InputError, match=r"needs code of its own; its files name classes in Python files"):
        load_pretrained(StableDiffusionPipeline, tmp_path)
    assert not (tmp_path / "ran").exists()
