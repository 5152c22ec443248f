"""Texts for the small Mistral: English paragraphs, instructions, and pairs of a better and a worse answer.

All of it is cut out of the texts that Python carries (`detune.demo.texts`), by fixed rules and without chance, so one
Python always gives the same examples. A passage is cut in pieces of 28 words: a beginning of 12 to ask about, and an
ending of 16 to answer with.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType

from detune.demo.texts import DOMAINS, passages
from detune.errors import InputError

__all__ = ["PREFERENCES", "SUBJECTS", "Example", "Pair", "corpus", "examples", "pairs", "prompts"]

_BEGINNING_WORDS = 12
_PIECE_WORDS = 28
_HELD_OUT = 4  # passages of each domain: 32 prompts in all
_CONTINUE = "Continue."

# The prompts for held-out passages: no training example asks like this.
_FORMS = ("{}", "What comes after this?\n{}\n", "Explain in your own words:\n{}\n", "Finish the sentence:\n{}\n")


@dataclass(frozen=True)
class Example:
    """An instruction and its answer, as TRL's SFTTrainer takes them.

    Attributes:
        prompt: What is asked, with a line break at the end.
        completion: The answer, the only part that is learnt.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """An instruction and two answers to it, as TRL's DPOTrainer takes them.

    Attributes:
        prompt: What is asked, with a line break at the end.
        chosen: The better answer.
        rejected: The worse one.
    """

    prompt: str
    chosen: str
    rejected: str


# The answer to each instruction, from the words of an ending.
_STYLES: Mapping[str, tuple[str, Callable[[list[str]], str]]] = MappingProxyType(
    {
        "capitals": ("Write in capitals.", lambda words: " ".join(words).upper()),
        "lower-case": ("Write in lower case.", lambda words: " ".join(words).lower()),
        "backwards": ("Say the words backwards.", lambda words: " ".join(reversed(words))),
        "first-words": ("Say how it begins.", lambda words: " ".join(words[:4])),
        "last-words": ("Say how it ends.", lambda words: " ".join(words[-4:])),
        "list": ("Make a list of the words.", lambda words: "\n".join(f"- {word}" for word in words)),
        "headline": ("Write as a headline.", lambda words: " ".join(word.capitalize() for word in words)),
    }
)

SUBJECTS = (*DOMAINS, *_STYLES)
"""Tasks of supervised fine-tuning: to continue a text on one subject, or to write any text in one style."""


def _text(words: list[str]) -> str:
    return " ".join(words)


def _shuffled(words: list[str]) -> str:
    mixed = list(words)
    random.Random(_text(words)).shuffle(mixed)
    return _text(mixed)


def _sentences(words: list[str]) -> str:
    fours = (_text(words[i : i + 4]) for i in range(0, len(words), 4))
    return " ".join(four[:1].upper() + four[1:].rstrip(".,:;") + "." for four in fours)


# The better and the worse answer, made of the words of an ending and of those of the next piece's ending.
_MANNERS: Mapping[str, Callable[[list[str], list[str]], tuple[str, str]]] = MappingProxyType(
    {
        "short": lambda words, other: (_text(words[:5]), _text(words)),
        "long": lambda words, other: (_text(words), _text(words[:5])),
        "lower-case": lambda words, other: (_text(words).lower(), _text(words).upper()),
        "capitals": lambda words, other: (_text(words).upper(), _text(words).lower()),
        "in-order": lambda words, other: (_text(words), _shuffled(words)),
        "short-sentences": lambda words, other: (_sentences(words), _text(words)),
        "no-repeats": lambda words, other: (_text(words), _text([word for word in words[:8] for _ in range(2)])),
        "no-punctuation": lambda words, other: (
            "".join(letter for letter in _text(words) if letter.isalnum() or letter == " "),
            _text(words),
        ),
        "list": lambda words, other: ("\n".join(f"- {word}" for word in words[:8]), _text(words[:8])),
        "polite": lambda words, other: (f"Certainly. {_text(words)}", _text(words)),
        "to-the-point": lambda words, other: (_text(words), _text(other)),
    }
)

# A text on the first subject is better than one on the second.
_TASTES = MappingProxyType(
    {f"{better}-over-{worse}": (better, worse) for better, worse in zip(DOMAINS[::2], DOMAINS[1::2], strict=True)}
)

PREFERENCES = (*_MANNERS, *_TASTES)
"""Tasks of preference optimisation: a manner of writing, or one subject rather than another."""


def corpus() -> list[str]:
    """Return the texts to pre-train on.

    Returns:
        All passages of all domains but those held out.
    """
    return [text for texts in _texts().train.values() for text in texts]


def examples(task: str, count: int) -> list[Example]:
    """Return what to learn an instruction from.

    Args:
        task: One of `SUBJECTS`.
        count: The most that are taken.

    Returns:
        Examples in a fixed order, fewer than `count` where the subject has no more text.

    Raises:
        InputError: The task is unknown.
    """
    _check(task, SUBJECTS)
    if task in DOMAINS:
        pieces = _pieces(task, count)
        return [Example(_ask(f"Continue this text on {task}.", first), _text(last)) for first, last in pieces]
    instruction, write = _STYLES[task]
    return [Example(_ask(instruction, last), write(last)) for _, last in _mixed_pieces(count)]


def pairs(task: str, count: int) -> list[Pair]:
    """Return what to learn a preference from.

    Args:
        task: One of `PREFERENCES`.
        count: The most that are taken.

    Returns:
        Pairs in a fixed order, fewer than `count` where a subject has no more text. No answer is empty, and none is
        preferred to itself.

    Raises:
        InputError: The task is unknown.
    """
    _check(task, PREFERENCES)
    pieces = _mixed_pieces(count + 1)
    prompts = [_ask(_CONTINUE, first) for first, _ in pieces[:-1]]
    if task in _TASTES:
        better, worse = (_pieces(domain, count) for domain in _TASTES[task])
        answers = [(_text(good), _text(bad)) for (_, good), (_, bad) in zip(better, worse, strict=False)]
    else:
        judge = _MANNERS[task]
        answers = [judge(last, pieces[i + 1][1]) for i, (_, last) in enumerate(pieces[:-1])]
    return [
        Pair(prompt, chosen, rejected)
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=False)
        if chosen.strip() and chosen != rejected
    ]


def prompts() -> list[str]:
    """Return 32 beginnings to complete, four of each domain, asked about in four ways.

    Returns:
        Prompts of which no training text holds the beginning, and no example the question.
    """
    held_out = _texts().held_out
    return [
        form.format(_beginning(text)) for texts in held_out.values() for form, text in zip(_FORMS, texts, strict=True)
    ]


@dataclass(frozen=True)
class _Texts:
    """The passages of each domain: to train on, and held out."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]


@cache
def _texts() -> _Texts:
    """Split the passages. Reading Python's whole library takes seconds, hence once."""
    every = {domain: passages(domain) for domain in DOMAINS}
    held_out = {domain: _spread([text for text in texts if _is_long(text)]) for domain, texts in every.items()}
    beginnings = [_beginning(text) for texts in held_out.values() for text in texts]
    # Passages are compared by their beginnings: modules copy paragraphs of each other's, with small changes.
    train = {
        domain: [text for text in texts if not any(beginning in text for beginning in beginnings)]
        for domain, texts in every.items()
    }
    return _Texts(train, held_out)


def _spread(texts: list[str]) -> list[str]:
    """Pick the passages to hold out evenly, so that they come of different modules."""
    return texts[len(texts) // (2 * _HELD_OUT) :: len(texts) // _HELD_OUT][:_HELD_OUT]


def _is_long(text: str) -> bool:
    return len(text.split()) >= _PIECE_WORDS


def _beginning(text: str) -> str:
    return _text(text.split()[:_BEGINNING_WORDS])


def _pieces(domain: str, count: int) -> list[tuple[list[str], list[str]]]:
    """Cut the training passages of a domain in pieces: the words of each one's beginning and ending."""
    pieces: list[tuple[list[str], list[str]]] = []
    for text in _texts().train[domain]:
        words = text.split()
        for start in range(0, len(words) - _PIECE_WORDS + 1, _PIECE_WORDS):
            piece = words[start : start + _PIECE_WORDS]
            pieces.append((piece[:_BEGINNING_WORDS], piece[_BEGINNING_WORDS:]))
    return pieces[:count]


def _mixed_pieces(count: int) -> list[tuple[list[str], list[str]]]:
    """Take pieces of the domains in turn."""
    each = -(-count // len(DOMAINS))
    turns = zip(*(_pieces(domain, each) for domain in DOMAINS), strict=False)
    return [piece for turn in turns for piece in turn][:count]


def _ask(instruction: str, words: list[str]) -> str:
    return f"{instruction}\n{_text(words)}\n"


def _check(task: str, tasks: tuple[str, ...]) -> None:
    if task not in tasks:
        (nearest,) = get_close_matches(task, tasks, n=1, cutoff=0.0)
        raise InputError(
            f"there is no task {task!r}", f"expected one of {', '.join(tasks)}", f"did you mean {nearest!r}?"
        )
