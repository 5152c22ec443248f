"""Audits that several tests look at: made once."""

import io
from pathlib import Path
from typing import Any

import pytest

from detune.audit import AuditReport, audit, behaviour, model_process
from detune.audit.page import render
from tests.families import Fine, edit, plain_family

# Of a tensor, and of a directory.
HOSTILE = "layer.0.<script>alert(1)</script><a href='https:evil'>%{x}\u202e\x1b[31m\u2028"
HOSTILE_FOLDER = "<img src=x onerror=document.title=1>"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are run in this process, to spare the tests the start of another one."""
    monkeypatch.setattr(model_process, "_limit_memory", lambda more_bytes: None)

    def run(command: Any, input: bytes, **_: Any) -> Any:  # as `subprocess.run` has it
        monkeypatch.setattr("sys.stdin", io.StringIO(input.decode()))
        model_process.main()
        return type("Ended", (), {"returncode": 0, "stderr": b""})

    monkeypatch.setattr(behaviour.subprocess, "run", run)


@pytest.fixture(scope="session")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Fine:
    """Four fine-tunes of a base that no library can run."""
    return plain_family(tmp_path_factory.mktemp("audited"), n=4)


@pytest.fixture(scope="session")
def report(fine: Fine) -> AuditReport:
    """Against the base."""
    return audit(fine.models, fine.base)


@pytest.fixture(scope="session")
def blind(fine: Fine) -> AuditReport:
    """Without it."""
    return audit(fine.models)


@pytest.fixture(scope="session")
def page_file(report: AuditReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the audit against the base."""
    file = tmp_path_factory.mktemp("page") / "audit.html"
    file.write_text(render(report), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of models whose names are made to run something."""
    fine = plain_family(tmp_path_factory.mktemp("hostile") / HOSTILE_FOLDER)
    for path in (fine.base, *fine.models):
        edit(path, lambda state: state.update({HOSTILE: state.pop("layer.0.weight")}))
    return render(audit(fine.models, fine.base))
