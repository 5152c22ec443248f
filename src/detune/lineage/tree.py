"""The result: the family's tree, with what each edge is."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from detune.errors import InputError, printable


class EdgeKind(StrEnum):
    """The step that made a model of its parent."""

    LORA = "LoRA"
    """Low-rank updates, merged."""
    FULL = "full fine-tune"
    """Updates in every direction."""
    LIGHT = "light fine-tune"
    """Updates below a step of half precision: LoRA and full fine-tunes look alike."""
    STRENGTH = "another strength"
    """The parent's own adapter, merged at another strength."""
    CHECKPOINT = "later checkpoint"
    """The parent's own run, trained on."""
    MERGE = "merge of two models"
    """On the line between two others."""
    QUANTISED = "quantisation"
    """Rounded to levels, or to a coarser dtype."""
    VOCABULARY = "vocabulary"
    """The weights that were looked at are the parent's; tokens were added."""
    OTHER = "other tensors"
    """The weights that were looked at are the parent's; other tensors differ."""


@dataclass(frozen=True)
class Node:
    """A model, or an ancestor that none of the models is.

    Attributes:
        name: Short and unique.
        spec: The model as the user gave it; None for an ancestor that was not given.
        parent: The name of its parent; None for a root.
        kind: What made it of its parent; None for a root.
        rank: Rank of the updates, the median of some matrices, where it shows.
        tokens: How many tokens it has more than its parent, where the vocabularies differ.
        sure: Whether its parent is known to be the older of the two. Where it is not, the tree as a whole decided: most
            publishers fine-tune one base several times.
        why: What the direction rests on, in a sentence; empty for a root.
        other_parent: The name of the second parent of a merge.
        share: How much of the second parent is in a merge.
        recover_from: The models that an ancestor which was not given can be recovered from; empty where they are few.
    """

    name: str
    spec: str | None
    parent: str | None = None
    kind: EdgeKind | None = None
    rank: int | None = None
    tokens: int = 0
    sure: bool = True
    why: str = ""
    other_parent: str | None = None
    share: float | None = None
    recover_from: tuple[str, ...] = ()

    @property
    def edge(self) -> str:
        """The step that made it of its parent, in a few words."""
        if self.kind is None:
            return ""
        said = f"{self.kind} of rank {self.rank}" if self.rank and self.kind is EdgeKind.LORA else str(self.kind)
        if self.share is not None:
            said += f", {100 * self.share:.0f} % of {self.other_parent}"
        if self.tokens and self.kind is not EdgeKind.VOCABULARY:
            said += ", vocabulary"
        return said + (f", {self.tokens:+} tokens" if self.tokens else "")


@dataclass(frozen=True)
class Lineage:
    """The descent of some models.

    Attributes:
        nodes: Models and ancestors, parents before their children; several roots where bases differ.
        unrelated: Specs of models of another architecture.
        looked_at: Number of matrices that the tree is judged by.
        seconds: Time taken.
    """

    nodes: tuple[Node, ...]
    unrelated: tuple[str, ...]
    looked_at: int
    seconds: float

    def node(self, name: str) -> Node:
        """A node by its name, or by the model's spec.

        Raises:
            InputError: There is none.
        """
        for each in self.nodes:
            if name in (each.name, each.spec):
                return each
        names = ", ".join(each.name for each in self.nodes if each.spec is None) or "none"
        raise InputError(f"no node {name!r} in the tree", f"ancestors in it: {names}", "see `detune family`")

    def children(self, name: str | None) -> Iterator[Node]:
        """The children of a node; of None the roots."""
        return (node for node in self.nodes if node.parent == name)

    def sources(self, name: str) -> tuple[str, ...]:
        """The models that an ancestor can be recovered from.

        Raises:
            InputError: There is no such node, it is a model that was given, or there are too few.
        """
        node = self.node(name)
        if node.spec is not None:
            raise InputError(f"{name} is one of the models", "expected an ancestor that none of them is", "copy it")
        if not node.recover_from:
            raise InputError(
                f"{name} cannot be recovered from these models",
                "fewer than three ways lead from it to models a low rank away",
                "add models that descend from it",
            )
        return node.recover_from

    def to_mermaid(self) -> str:
        """A picture, as a flowchart in the language of Mermaid; ancestors that were not given are dashed."""
        ids = {node.name: f"n{k}" for k, node in enumerate(self.nodes)}
        lines = ["flowchart TD"]
        for node in self.nodes:
            label = _quoted(node.name)
            lines.append(f"  {ids[node.name]}[{label}]" if node.spec else f"  {ids[node.name]}([{label}]):::hidden")
        for node in self.nodes:
            if node.parent is not None:
                arrow = "-->" if node.sure else "-.->"
                lines.append(f"  {ids[node.parent]} {arrow}|{_quoted(node.edge)}| {ids[node.name]}")
            if node.other_parent is not None:
                lines.append(f"  {ids[node.other_parent]} --> {ids[node.name]}")
        lines.append("  classDef hidden stroke-dasharray: 4")
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text as Mermaid takes it whatever is in it: a line, all but letters, digits and a few signs by its number."""
    shown = (each if each.isalnum() or each in " .-_+" else f"#{ord(each)};" for each in printable(text))
    return f'"{"".join(shown)}"'
