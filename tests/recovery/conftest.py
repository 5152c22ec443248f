"""What tests of whole runs share."""

from typing import Any

import pytest

from detune.recovery.execution import job


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A mark for every tensor that is solved from now on in this process."""
    marks: list[str] = []
    solve = job.solve_tensor

    def mark(*arguments: Any) -> Any:
        marks.append("solved")
        return solve(*arguments)

    monkeypatch.setattr(job, "solve_tensor", mark)
    return marks
