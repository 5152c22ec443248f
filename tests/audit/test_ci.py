"""The workflow of docs/ci.md, whose steps are run as GitHub runs them, and what the page gives for elsewhere."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.audit.test_sarif import OFFICIAL
from tests.families import Fine, plain_family
from tests.schemas import require_valid

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
(WORKFLOW,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
STEPS: list[dict[str, Any]] = yaml.safe_load(WORKFLOW)["jobs"]["audit"]["steps"]
# What stands for pip writes down what it was called with: nothing is installed in a test.
PIP = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$PIP_LOG"\n'
DETUNE = f'#!/bin/sh\nexec {sys.executable} -m detune "$@"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with three releases in models/ that give their base away, and the two programs on the path."""
    fine: Fine = plain_family(tmp_path / "elsewhere")
    (tmp_path / "repository" / "models").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for model in fine.models[:3]:
        model.rename(tmp_path / "repository" / "models" / model.name)
    for name, text in (("pip", PIP), ("detune", DETUNE)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path / "repository"


def shell(command: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a step of a job: by `bash -e`, at the repository's root."""
    tools = checkout.parent
    path = f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PIP_LOG": str(tools / "pip.log")}
    return subprocess.run(["bash", "-e", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True)


def test_each_step_of_the_workflow_does_what_the_page_says(checkout: Path) -> None:
    steps = [step["run"] for step in STEPS if "run" in step]
    ran = [shell(step, checkout) for step in steps]
    assert [each.returncode for each in ran] == [0, 0, 1], ran
    assert "come back" in ran[-1].stdout
    uploads = [step["with"].get("sarif_file") or step["with"]["path"] for step in STEPS if step.get("if")]
    assert sorted(path.name for path in checkout.iterdir()) == sorted(["models", *uploads])
    log = json.loads((checkout / "audit.sarif").read_text())
    jsonschema.Draft4Validator(OFFICIAL).validate(log)
    for result in log["runs"][0]["results"]:
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert (checkout / place).is_file(), "GitHub looks for it from the root"


def test_what_the_workflow_installs_exists(checkout: Path) -> None:
    for step in STEPS:
        if "pip install" in step.get("run", ""):
            shell(step["run"], checkout)
    words = (checkout.parent / "pip.log").read_text().split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = (re.fullmatch(r"detune\[(\w+)\]", word) for word in words if word.startswith("detune"))
    assert extra is not None
    assert extra[1] in project["optional-dependencies"]
    (python,) = (step["with"]["python-version"] for step in STEPS if "python-version" in step.get("with", {}))
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


def test_the_line_for_elsewhere_stops_at_an_error_alone(checkout: Path) -> None:
    (line,) = (line for line in PAGE.splitlines() if line.startswith("detune audit models/* --weights-only --json"))
    assert shell(line, checkout).returncode == 0
    assert require_valid("audit", (checkout / "audit.json").read_text())["verdict"]["given_away"] > 0
    (checkout / "models" / "model-1" / "model.safetensors").write_bytes(b"no weights")
    failed = shell(line, checkout)
    assert failed.returncode == 1
    assert failed.stderr.startswith("detune: error: ")
