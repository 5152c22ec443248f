"""Audits that several tests look at: made once."""

from pathlib import Path

import pytest

from detune.audit import AuditReport, audit
from detune.audit.page import render
from tests.families import Fine, edit, plain_family

# Of a tensor, and of a directory.
HOSTILE = "layer.0.<script>alert(1)</script><a href='https:evil'>%{x}\u202e\x1b[31m\u2028"
HOSTILE_FOLDER = "<img src=x onerror=document.title=1>"


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
