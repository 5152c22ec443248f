"""The share of the models that a statement rests on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """The share of the models that was read, where some rows of each matrix were enough.

    Attributes:
        rows: Rows looked at in each matrix.
        read_bytes: Bytes of tensors read.
        total_bytes: Bytes of all tensors of all models.
    """

    rows: int
    read_bytes: int
    total_bytes: int
