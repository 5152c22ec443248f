"""Rounding to GGUF's Q4_K, Q5_K and Q6_K, which the package `gguf` reads and does not write.

A superblock of 256 weights in a row has 8 blocks of 32 (Q4_K, Q5_K), each with a scale and a minimum of 6 bits, or 16
blocks of 16 (Q6_K), each with a scale of 8 bits; these are multiples of one or two numbers in fp16:

    x = d s q - d_min m          q in 0..15 or 0..31          Q4_K, Q5_K
    x = d s q                    q in -32..31                 Q6_K

The scale of a block is its range over the number of steps. llama.cpp searches for a better one near it; the levels are
of the same kind.

Reference:
    The layouts are those of `block_q4_K`, `block_q5_K` and `block_q6_K` in llama.cpp's ggml-common.h.
"""

import gguf
import numpy as np

SUPERBLOCK = 256
Kind = gguf.GGMLQuantizationType
Array = np.ndarray


def quantize(values: Array, kind: Kind) -> Array:
    """Round a matrix to a format, of the three or of those that `gguf` writes.

    Args:
        values: `(out, in)`, float32, with a multiple of 256 columns.
        kind: The format.

    Returns:
        The bytes of each row, uint8.
    """
    if kind is Kind.Q6_K:
        blocks = _q6(values)
    elif kind in (Kind.Q4_K, Kind.Q5_K):
        blocks = _with_minima(values, 5 if kind is Kind.Q5_K else 4)
    else:
        return gguf.quantize(values, kind)
    return blocks.reshape(len(values), -1)


def _q6(values: Array) -> Array:
    x = values.reshape(-1, 16, 16).astype(np.float64)
    wanted = np.abs(x).max(axis=2) / 31
    d, s = _multiples(wanted, 127)
    q = np.round(x / _step(d, s)).clip(-32, 31).astype(np.int16) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.concatenate([ql.reshape(-1, 128), qh.reshape(-1, 64), s.astype(np.uint8), _bytes(d)], axis=1)


def _with_minima(values: Array, bits: int) -> Array:
    x = values.reshape(-1, 8, 32).astype(np.float64)
    lowest = np.minimum(x.min(axis=2), 0)
    d, s = _multiples((np.maximum(x.max(axis=2), 0) - lowest) / (2**bits - 1), 63)
    d_min, m = _multiples(-lowest, 63)
    shifted = x + (d_min.astype(np.float64)[:, None] * m)[:, :, None]
    q = np.round(shifted / _step(d, s)).clip(0, 2**bits - 1).astype(np.uint8)
    nibbles = (q & 15).reshape(-1, 4, 2, 32)
    qs = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128)
    fifth = [(q[:, i] >> 4) << i for i in range(8)]
    qh = [np.bitwise_or.reduce(fifth)] if bits == 5 else []
    return np.concatenate([_bytes(d), _bytes(d_min), _packed(s, m), *qh, qs], axis=1)


def _multiples(wanted: Array, most: int) -> tuple[Array, Array]:
    """A number in fp16 for each superblock, and the multiple of it that each block has."""
    d = (wanted.max(axis=1) / most).astype(np.float16)
    whole = np.where(d == 0, 1, d).astype(np.float64)
    return d, np.round(wanted / whole[:, None]).clip(0, most).astype(np.uint8)


def _step(d: Array, s: Array) -> Array:
    step = d.astype(np.float64)[:, None] * s
    return np.where(step == 0, 1, step)[:, :, None]


def _packed(s: Array, m: Array) -> Array:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    first = [each[:, :4] | (each[:, 4:] >> 4) << 6 for each in (s, m)]
    return np.concatenate([*first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


def _bytes(d: Array) -> Array:
    return d.view(np.uint8).reshape(-1, 2)
