"""A row of the table of defences: what each attack got out of defended releases, and what follows."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum

__all__ = ["AttackResult", "DefenceOutcome", "RowResult"]

BROKEN, PARTLY = 10.0, 2.0


class DefenceOutcome(StrEnum):
    """The worth of a defence, by how much closer its best attack comes than averaging undefended releases does.

    Attributes:
        SURVIVES: Below 2 times.
        PARTLY: Between.
        BROKEN: From 10 times on.
        NO_ANSWER: No attack gave an answer, which says nothing for the defence.
    """

    SURVIVES = "survives"
    PARTLY = "broken partly"
    BROKEN = "broken"
    NO_ANSWER = "no answer"


@dataclass(frozen=True)
class AttackResult:
    """An attack on a row, and what it got.

    Attributes:
        name: Its name.
        w_error: Mean of log10 of the mean squared error over the fine-tuned matrices; None where there was no answer.
        embeddings: Mean cosine distance of the recovered model's embeddings from the base's, over that of the first
            fine-tune, undefended.
        failure: Why there was no answer.
        seconds: How long it took.
    """

    name: str
    w_error: float | None
    embeddings: float | None
    failure: str | None
    seconds: float


@dataclass(frozen=True)
class RowResult:
    """A row of the table: a defence, and what each attack on it got.

    Attributes:
        name: As `Row.name`.
        defence: With its settings.
        models: Number of releases.
        accuracy: Task accuracy of the defended releases, on passages they were not trained on.
        undefended_accuracy: The same of ordinary fine-tunes without a defence.
        undefended_w_error: Of the average of as many ordinary releases without a defence: what anybody has.
        undefended_embeddings: The same average's distance by embeddings, as in `AttackResult`.
        attacks: Each attack.
    """

    name: str
    defence: str
    models: int
    accuracy: float
    undefended_accuracy: float
    undefended_w_error: float
    undefended_embeddings: float
    attacks: tuple[AttackResult, ...] = ()

    @property
    def cost(self) -> float:
        """The share of the task accuracy that is lost; negative where the defended models are better."""
        return 1 - self.accuracy / self.undefended_accuracy

    @property
    def answers(self) -> tuple[AttackResult, ...]:
        """The attacks that gave an answer."""
        return tuple(attack for attack in self.attacks if attack.w_error is not None)

    @property
    def best(self) -> AttackResult | None:
        """The attack that came closest; None where none gave an answer."""
        return min(self.answers, key=lambda attack: attack.w_error or 0.0, default=None)

    @property
    def times_closer(self) -> float | None:
        """The factor by which the best attack comes closer to the base than averaging undefended releases does.

        In root mean square, and by the weights or by the embeddings, whichever shows more: noise can be all over the
        weights and do nothing, and where the model comes back its weights need not. None where no attack gave an
        answer.
        """
        if not self.answers:
            return None
        weights = max(10 ** ((self.undefended_w_error - (attack.w_error or 0.0)) / 2) for attack in self.answers)
        function = max(
            (self.undefended_embeddings / max(attack.embeddings or 0.0, 1e-30)) ** 0.5 for attack in self.answers
        )
        return float(max(weights, function))

    @property
    def outcome(self) -> DefenceOutcome:
        """Whether the defence survives its best attack."""
        if self.times_closer is None:
            return DefenceOutcome.NO_ANSWER
        if self.times_closer >= BROKEN:
            return DefenceOutcome.BROKEN
        return DefenceOutcome.PARTLY if self.times_closer >= PARTLY else DefenceOutcome.SURVIVES

    def to_json(self) -> str:
        """All that was measured, as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def of_json(cls, text: str) -> "RowResult":
        """Inverse of `to_json`.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is there in addition.
            ValueError: It is no JSON.
        """
        content = json.loads(text)
        return cls(**content | {"attacks": tuple(AttackResult(**attack) for attack in content["attacks"])})
