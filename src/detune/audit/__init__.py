"""The audit of a release: the recovery as an outsider runs it, its report and its page.

Needs `pip install 'detune[audit]'`.
"""

from detune.audit.record import AuditReport
from detune.audit.run import audit

__all__ = ["AuditReport", "audit"]
