"""Findings in words: the curve, what was found, and the verdict."""

import math
from collections.abc import Collection, Sequence
from statistics import fmean

from pydantic import JsonValue

from detune.audit.members import ENOUGH
from detune.audit.record import (
    Behaviour,
    Conclusion,
    CurvePoint,
    Level,
    ModelEntry,
    Outcome,
    Result,
    Rule,
    TensorEntry,
    Unchanged,
)
from detune.audit.trial import AT_FLOOR, CLOSER
from detune.certificate.verdict import Verdict
from detune.compatibility.shared import some

__all__ = ["FINDINGS", "curve_of", "find", "verdict_of"]

FINDINGS = (
    Rule(
        id="given-away",
        title="A matrix is given away",
        help=f"Against the base: the error is within {AT_FLOOR:.0f} times the rounding of the releases, or "
        f"{CLOSER:.0f} times smaller than what fine-tuning changed. Without the base: the certificate says exact, or "
        "to the storage floor. What fewer releases give away stays so with more.",
    ),
    Rule(
        id="one-too-many",
        title="The release that was one too many",
        help="The first number of releases with which as many matrices are given away as with all of them.",
    ),
    Rule(id="kept", title="A matrix is kept", help="These releases do not give it away; another one may."),
    Rule(
        id="unchanged",
        title="Tensors that no release changed",
        help="They are the base's own, and published as they are with the first release.",
    ),
    Rule(
        id="common-part",
        title="A part that all fine-tunes have in common",
        help="An outsider takes it for the base's. It differs from the base that was given.",
    ),
    Rule(id="averaged", title="A vector that every release changed", help="It has no low rank and is averaged."),
    Rule(
        id="behaviour",
        title="What the recovered model does",
        help="The same inputs through the base, a release and the recovered model.",
    ),
    Rule(id="left-out", title="A release that was left out", help="It does not fit the others, or has another base."),
)


def curve_of(matrices: Sequence[TensorEntry], releases: int) -> tuple[CurvePoint, ...]:
    """The matrices together, for one release, for two, and so on."""
    return tuple(
        _point(models, [entry.outcomes[models - 1] for entry in matrices]) for models in range(1, releases + 1)
    )


def _point(models: int, outcomes: Sequence[Outcome]) -> CurvePoint:
    errors = [outcome.w_error for outcome in outcomes if outcome.w_error is not None]
    predicted = [outcome.predicted_w_error for outcome in outcomes if outcome.predicted_w_error is not None]
    ends = [(o.best_w_error, o.worst_w_error) for o in outcomes if o.worst_w_error is not None]
    lower, upper = ([end for end in side if end is not None] for side in zip(*ends, strict=True)) if ends else ([], [])
    identical = [outcome.identical for outcome in outcomes if outcome.identical is not None]
    return CurvePoint(
        models=models,
        given_away=sum(outcome.given_away for outcome in outcomes),
        w_error=fmean(errors) if errors else None,
        best=min(errors, default=None),
        worst=max(errors, default=None),
        predicted_w_error=fmean(predicted) if predicted else None,
        best_w_error=fmean(lower) if lower and len(lower) == len(upper) else None,
        worst_w_error=fmean(upper) if upper else None,
        identical=fmean(identical) if identical else None,
    )


def one_too_many(curve: Sequence[CurvePoint]) -> int | None:
    """The first number of releases with which as many matrices are given away as with all; None where none is."""
    final = curve[-1].given_away
    return next(point.models for point in curve if point.given_away >= final) if final else None


def find(
    tensors: Sequence[TensorEntry],
    curve: Sequence[CurvePoint],
    unchanged: Unchanged,
    models: Sequence[ModelEntry],
    behaviour: Behaviour,
) -> tuple[Result, ...]:
    """Everything that was found, the worst first."""
    release = one_too_many(curve)
    results = []
    if release is not None:
        count = curve[release - 1].given_away
        message = f"from release {release} on, {count} of {_count(_matrices(tensors), 'matrix')} are given away"
        results.append(
            Result(
                rule_id="one-too-many",
                level="error",
                message=message,
                properties={"release": release, "given_away": count},
            )
        )
    results += [_of_tensor(entry) for entry in tensors]
    results += [
        Result(
            rule_id="common-part",
            level="warning",
            message="the same in all releases, and not the base's",
            tensor=name,
        )
        for name in unchanged.differing
    ]
    if unchanged.tensors:
        message = f"{_count(unchanged.tensors, 'tensor')} of {unchanged.entries:,} weights are as the base has them"
        results.append(Result(rule_id="unchanged", level="note", message=message))
    if behaviour.metric is not None:
        results.append(_of_behaviour(behaviour))
    results += [
        Result(rule_id="left-out", level="note", message=f"{model.spec}: {model.left_out}")
        for model in models
        if model.left_out is not None
    ]
    order = ("error", "warning", "note")
    return tuple(sorted(results, key=lambda result: order.index(result.level)))


def _of_tensor(entry: TensorEntry) -> Result:
    outcome = entry.outcomes[-1]
    properties = outcome.model_dump(
        mode="json", include={"method", "verdict", "ranks", "w_error", "predicted_w_error", "identical", "models"}
    )
    if not entry.is_matrix:
        level: Level = "error" if outcome.given_away else "note"
        rule = "given-away" if outcome.given_away else "averaged"
        return Result(rule_id=rule, level=level, message=outcome.reason, tensor=entry.name, properties=properties)
    first = next((found.models for found in entry.outcomes if found.given_away), None)
    if not outcome.given_away:
        level = "warning" if outcome.verdict is Verdict.APPROXIMATE else "note"
        return Result(rule_id="kept", level=level, message=outcome.reason, tensor=entry.name, properties=properties)
    return Result(
        rule_id="given-away",
        level="error",
        message=f"{outcome.verdict} with {_count(outcome.models, 'release')}, given away from release {first} on",
        tensor=entry.name,
        properties=properties,
    )


def _of_behaviour(behaviour: Behaviour) -> Result:
    figures: dict[str, JsonValue] = {
        "metric": behaviour.metric,
        "release": behaviour.release,
        "recovered": behaviour.recovered,
    }
    if behaviour.recovered is None or behaviour.release is None:
        message = f"the first release is {behaviour.release:.2g} from the recovered model in {behaviour.metric}"
        return Result(rule_id="behaviour", level="note", message=message, properties=figures)
    message = (
        f"{behaviour.metric}: the recovered model is {behaviour.recovered:.2g} from the base, "
        f"the first release {behaviour.release:.2g}"
    )
    level: Level = "error" if _does_the_same(behaviour) else "note"
    return Result(rule_id="behaviour", level=level, message=message, properties=figures)


def _does_the_same(behaviour: Behaviour) -> bool:
    """Whether the recovered model does what the base does, beside a release."""
    if behaviour.recovered is None or behaviour.release is None:
        return False
    return behaviour.recovered <= behaviour.release / CLOSER


def verdict_of(
    tensors: Sequence[TensorEntry],
    curve: Sequence[CurvePoint],
    unchanged: Unchanged,
    behaviour: Behaviour,
    base: Collection[str] | None,
) -> Conclusion:
    """The audit in some sentences.

    Args:
        tensors: Those that differ between releases.
        curve: The matrices together.
        unchanged: The other tensors.
        behaviour: What the models do.
        base: The names of the base's tensors; None where it was not given.
    """
    has_base = base is not None
    matrices, final, release = _matrices(tensors), curve[-1].given_away, one_too_many(curve)
    n = len(curve)
    these = f"These {n} releases" if n > 1 else "This release"
    if not final and behaviour.release and _does_the_same(behaviour):
        # Noise all over the weights, and next to nothing in what they do.
        level: Level = "warning"
        headline = f"{these} give{'s' * (n == 1)} away what the base does, and not its weights."
    elif not final:
        level = "note"
        verb = "do" if n > 1 else "does"
        headline = f"{these} {verb} not give the base away."
    elif final < matrices:
        level = "warning"
        headline = f"{these} give{'s' * (n == 1)} part of the base away."
    else:
        level = "error"
        headline = f"{these} give{'s' * (n == 1)} the base away."
    sentences = [_counted(final, matrices, release, n, has_base)]
    sentences += _closeness(tensors, has_base)
    sentences += _shares(tensors, unchanged)
    if base is not None and (new := [entry.name for entry in tensors if entry.name not in base]):
        verb = "is" if len(new) == 1 else "are"
        sentences.append(f"{_count(len(new), 'tensor')} {verb} not in the base, and judged without it: {some(new)}.")
    sentences += _same_outputs(behaviour)
    return Conclusion(
        level=level,
        headline=headline,
        sentences=tuple(sentences),
        next_steps=tuple(_next_steps(level, release, n)),
        matrices=matrices,
        given_away=final,
        one_too_many=release,
    )


def _counted(final: int, matrices: int, release: int | None, n: int, has_base: bool) -> str:
    # One release alone does not tell which matrices were fine-tuned.
    noun = "fine-tuned matrix" if has_base or n > 1 else "matrix"
    counted = f"{final} of {_count(matrices, noun)} come{'s' * (final == 1)} back"
    if release is None:
        return f"{counted}."
    if release == 1:
        return f"{counted}, from the first release alone."
    if release == n:
        return f"{counted}; release {release}, the last, was the one too many."
    return f"{counted}; release {release} was the one too many."


def _closeness(tensors: Sequence[TensorEntry], has_base: bool) -> list[str]:
    """Sentences on how close the recovered weights are, in terms that need no logarithm."""
    ratios = []
    for entry in tensors:
        outcome = entry.outcomes[-1]
        error = outcome.w_error if has_base else outcome.predicted_w_error
        if entry.is_matrix and outcome.given_away and error is not None and entry.change:
            ratios.append(math.log10(entry.change) - error / 2)
    exact = sum(
        entry.is_matrix and entry.outcomes[-1].given_away and entry.outcomes[-1].is_exact(measured=has_base)
        for entry in tensors
    )
    sentences = []
    if exact:
        sentences.append(f"{_count(exact, 'matrix')} {'are' if exact > 1 else 'is'} exact, to the last bit.")
    times = 10 ** fmean(ratios) if ratios else 0.0
    if times >= AT_FLOOR:
        prefix = "The" if has_base else "By the certificate, the"
        sentences.append(
            f"{prefix} recovered weights are {_round(times)} times closer to the base than the fine-tuned ones."
        )
    return sentences


def _shares(tensors: Sequence[TensorEntry], unchanged: Unchanged) -> list[str]:
    entries = [(entry, math.prod(entry.shape)) for entry in tensors]
    open_ = unchanged.entries + sum(size for entry, size in entries if entry.outcomes[-1].given_away)
    total = unchanged.entries + sum(size for _, size in entries)
    share = 100 * open_ / total
    shown = "All" if open_ == total else f"{min(share, 99.9):.1f} % of all"
    never = f"; {unchanged.entries:,} of them were never fine-tuned" if unchanged.entries else ""
    return [f"{shown} {total:,} weights of the base are open{never}."] if open_ else []


def _same_outputs(behaviour: Behaviour) -> list[str]:
    if behaviour.recovered is None or behaviour.release is None:
        return []
    distance = "nothing" if behaviour.recovered == 0 else f"{behaviour.recovered:.1e}"
    does = "does" if _does_the_same(behaviour) else "does not do"
    return [
        f"The recovered model {does} what the base does: it differs by {distance}, "
        f"a release by {behaviour.release:.1e} ({behaviour.meaning})."
    ]


def _next_steps(level: Level, release: int | None, n: int) -> list[str]:
    steps = []
    if level == "note":
        missing = ENOUGH - n
        if missing > 0:
            steps.append(
                f"Before {'a third release' if missing == 1 else 'more releases'} of this base, audit again: three are "
                "usually enough."
            )
        steps.append("Every further release counts: audit it together with these before it goes out.")
    else:
        if release is not None and release > 1:
            steps.append(
                f"What is out cannot be called back. Had fewer than {release} been released, this would not work."
            )
        steps.append("For releases to come, look at what `detune defend --help` lists, and audit what it makes.")
    steps.append("What each assumption is worth, and what a defence costs, is in docs/threat-model.md.")
    return steps


def _matrices(tensors: Sequence[TensorEntry]) -> int:
    return sum(entry.is_matrix for entry in tensors)


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-2]}ices" if noun.endswith("ix") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _round(times: float) -> str:
    """A ratio to one digit, in words where it is large."""
    for size, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if times >= size:
            return f"{float(f'{times / size:.1g}'):,.0f}{name}"
    return f"{float(f'{times:.1g}'):,.0f}" if times >= 10 else f"{times:.1f}"
