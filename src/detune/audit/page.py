"""The report as one HTML page that needs nothing else: styles, scripts and figures are in it."""

import base64
import hashlib
import shlex
from importlib import resources
from typing import TYPE_CHECKING, Any

from detune._runtime import needs_extra
from detune.audit.assumptions import ASSUMPTIONS
from detune.audit.figures import charts, error_of
from detune.audit.naming import short_names
from detune.audit.record import AuditReport
from detune.errors import printable

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["render"]

PLOTLY = "plotly-cartesian.min.js"
# The name of each level, and its sign: colour is not the only carrier.
BADGES = {"error": ("▲", "Given away"), "warning": ("◆", "Partly given away"), "note": ("●", "Kept")}
HOLDS = {True: ("✓", "holds"), False: ("✗", "does not hold"), None: ("?", "not known")}


def render(report: AuditReport) -> str:
    """Make the page.

    Everything that comes from a model is escaped, and the page's own policy lets nothing but its two scripts run and
    nothing be fetched.

    Args:
        report: Report of an audit.

    Returns:
        HTML.

    Raises:
        DetuneError: The extra `audit` is not installed.
    """
    with needs_extra("audit"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    plotly, script = _asset(PLOTLY), _asset("page.js")
    environment = Environment(
        loader=PackageLoader("detune.audit", "assets"),
        autoescape=True,
        finalize=_written_out,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": _number, "share": _share, "code": _code, "power": _power, "print": _print}
    shown = charts(report)
    return environment.get_template("page.html.jinja").render(
        report=report,
        charts=shown,
        figures={chart.id: chart.figure for chart in shown},
        badge=BADGES[report.verdict.level],
        holds=HOLDS,
        rules={rule.id: rule for rule in report.rules},
        assumptions=[result for result in report.results if result.rule_id in {rule.id for rule in ASSUMPTIONS}],
        kinds=short_names(dict.fromkeys(entry.kind for entry in report.tensors)),
        error_of=lambda outcome: error_of(report, outcome),
        command=shlex.join(report.invocation.argv),
        policy=_policy(plotly, script),
        style=Markup(_asset("page.css")),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def _asset(name: str) -> str:
    return resources.files("detune.audit").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    """The page's content security policy: these scripts run, and Plotly may draw heat maps as images."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _written_out(value: Any) -> Any:
    """Write out the characters of a text that a page would obey, turns of direction among others; keep its lines."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _code(text: str) -> "Markup":
    """Text with what stands between backquotes as code."""
    from markupsafe import Markup, escape

    parts = str(_written_out(text)).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if k % 2 else escape(part) for k, part in enumerate(parts)
    )


def _number(value: float | None, digits: int = 2) -> str:
    """A W-Error, with a minus sign as print has it."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _print(text: str) -> str:
    """Numbers in words, with minus signs as print has them."""
    return text.replace("-", "−") or "–"


def _power(value: float) -> "Markup":
    """A number with its power of ten raised."""
    from markupsafe import Markup

    if value == 0 or 0.001 <= value < 1000:
        return Markup(f"{value:.2g}")
    digits, exponent = f"{value:.1e}".split("e")
    return Markup("{} × 10<sup>{}</sup>").format(digits, str(int(exponent)).replace("-", "−"))


def _share(value: float | None) -> str:
    return "–" if value is None else "100 %" if value == 1 else f"{min(100 * value, 99.99):.2f} %"
