"""How much of the models a statement rests on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """How much of the models was read, where some rows of each matrix were enough.

    Attributes:
        rows: Rows looked at in each matrix.
        read_bytes: Bytes of tensors read.
        total_bytes: Bytes of all tensors of all models.
    """

    rows: int
    read_bytes: int
    total_bytes: int
