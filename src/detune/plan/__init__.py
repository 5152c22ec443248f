"""Plans: a command with `--dry-run` says what it would read and write, and how long it takes, and writes nothing."""

from detune.plan.commands import plan_extraction, plan_pack, plan_push, plan_recovery
from detune.plan.report import Made, Plan, Read, Spent

__all__ = ["Made", "Plan", "Read", "Spent", "plan_extraction", "plan_pack", "plan_push", "plan_recovery"]
