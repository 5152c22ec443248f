"""The models as a machine-learning bill of materials in CycloneDX, each with its ancestors as its pedigree."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from detune import __version__
from detune._runtime import OnPart, OnStart, telling
from detune.checkpoints import is_on_hub, open_checkpoint, raw
from detune.errors import DetuneError
from detune.lineage.tree import Lineage, Node

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

Hashes = Mapping[str, Mapping[str, str]]
"""For a model's spec the SHA-256 of each weight file, by relative path."""


def to_cyclonedx(lineage: Lineage, hashes: Hashes) -> str:
    """Write the models as CycloneDX 1.6 in JSON, validated against its schema.

    Models go by their short names, since paths hold the names of users.

    Args:
        lineage: The tree.
        hashes: Hashes of weight files, see `weight_hashes`; a model that is not there is listed without.

    Raises:
        DetuneError: The result does not fit the schema.

    Reference:
        https://cyclonedx.org/capabilities/mlbom
    """
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bom = Bom(components=[_component(lineage, node, hashes, reference=True) for node in lineage.nodes if node.spec])
    tool = Component(type=ComponentType.APPLICATION, name="detune", version=__version__)
    bom.metadata.tools.components.add(tool)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    why = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if why is not None:
        raise DetuneError("the bill of materials does not fit CycloneDX 1.6", str(why), "please report it")
    return f"{text}\n"


def weight_hashes(
    models: Sequence[str], on_start: OnStart | None = None, on_part: OnPart | None = None
) -> dict[str, dict[str, str]]:
    """Compute the SHA-256 of models' weight files; those of a model on the Hub are known there, and nothing is read.

    Args:
        models: As `detune.checkpoints.open_checkpoint` takes them.
        on_start: For progress: called once with the models, and what is read of each in bytes.
        on_part: Called with each of these when it is begun, and when it is done.

    Raises:
        InputError: A model cannot be read.
    """
    found = {}
    with ExitStack() as opened:
        given = {
            spec: opened.enter_context(open_checkpoint(spec, rows=1 if is_on_hub(spec) else None)) for spec in models
        }
        if on_start:
            on_start(
                {spec: 0 if raw(model).known_hashes() else raw(model).total_bytes for spec, model in given.items()}
            )
        for spec, model in given.items():
            with telling(on_part, spec):
                found[spec] = model.hashes()
    return found


def _component(lineage: Lineage, node: Node, hashes: Hashes, *, reference: bool) -> "Component":
    """A model with its ancestors up to the root; one that is an ancestor of another has no reference of its own."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    properties = {"detune:given": str(node.spec is not None).lower()}
    if node.kind is not None:
        properties |= {"detune:edge": node.edge, "detune:direction": node.why, "detune:sure": str(node.sure).lower()}
    parents = [lineage.node(name) for name in (node.parent, node.other_parent) if name is not None]
    files = hashes.get(node.spec or "", {})
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=node.name,
        bom_ref=f"model:{node.name}" if reference else None,
        components=[
            Component(
                type=ComponentType.FILE,
                name=file,
                bom_ref=f"file:{node.name}/{file}" if reference else None,
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
            )
            for file, sha256 in files.items()
        ],
        pedigree=Pedigree(
            ancestors=[_component(lineage, parent, hashes, reference=False) for parent in parents], notes=node.edge
        )
        if parents
        else None,
        properties=[Property(name=name, value=value) for name, value in properties.items()],
    )
