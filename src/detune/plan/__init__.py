"""What a command would read and write, and about how long it would take: `--dry-run`. Nothing is written."""

from detune.plan.commands import plan_extraction, plan_pack, plan_push, plan_recovery
from detune.plan.report import Made, Plan, Read, Spent

__all__ = ["Made", "Plan", "Read", "Spent", "plan_extraction", "plan_pack", "plan_push", "plan_recovery"]
