"""The solvers' input: the same weight matrix from every model, read in row blocks.

Differences are taken before anything is multiplied: `W_i - W_1` is exact or nearly so in floating point
(Sterbenz), while a product with the large `W_i` itself would bury the small delta under its rounding error.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from detune.errors import InputError
from detune.numerics.device import find_device, multiplies_bfloat16, upload
from detune.numerics.float_grid import HALVES
from detune.numerics.linalg import weighted_sum
from detune.numerics.random import seeded
from detune.problem.balance import Balance
from detune.problem.storage_noise import as_rounded, noise_edge, sample_rows, storage_variance


class NonFinite(InputError):
    """A matrix holds NaN or Inf.

    Attributes:
        model: Its place in the stack.
    """

    def __init__(self, model: int) -> None:
        super().__init__(f"matrix {model} holds NaN or Inf", "expected finite weights", "leave that model out")
        self.model = model


# Rows are taken in blocks whose working set, n + 2 times as much, stays inside the processor's caches: 2^18 float32
# entries are 1 MiB (derived). They are at least 64, or a product with a thin matrix would spend its time on reading
# that.
BLOCK_ENTRIES = 1 << 18
BLOCK_ROWS = 64
# Matrices of up to a million entries are computed in float64: `auto` takes 0.2 s on one thread for three of 1024x1024
# (random matrices, rank 16), and any number does that is as quick.
SMALL_ENTRIES = 1 << 20
# A float32 GEMM over D with blocked accumulation errs by about 3e-7 rms(D) per unit test vector: by a fiftieth of the
# storage noise sigma where rms(D) is 2^16 sigma (derived).
FLOAT32_RANGE = float(1 << 16)
# Rounding whose spectral norm is a sixteenth of the noise's adds less than a hundredth to its energy (derived: 1/256).
COVERED = 1 / 16


@dataclass(frozen=True)
class Block:
    """Some rows of the stack, with what the models have in common taken off.

    Attributes:
        rows: Which rows of the matrices these are.
        reference: `W_1` on these rows, `(rows, in)`, compute dtype.
        buffer: Memory for n times as much, `(n, rows, in)`: `W_i - W_1` in all but the first, until they are centred.
    """

    rows: slice
    reference: Tensor
    buffer: Tensor

    @property
    def differences(self) -> Tensor:
        """`W_i - W_1` for every model but the first, `(n - 1, rows, in)`: not to be had any more once centred."""
        return self.buffer[1:]

    @cached_property
    def offset(self) -> Tensor:
        """`mean_i W_i - W_1`, `(rows, in)`: kept apart, because it is small and `W_1` is not."""
        return weighted_sum(self.differences, 1 / len(self.buffer))

    @cached_property
    def centred(self) -> Tensor:
        """`W_i - mean_j W_j` for every model, `(n, rows, in)`, in the memory of the differences."""
        offset = self.offset
        self.differences.sub_(offset)
        torch.neg(offset, out=self.buffer[0])
        return self.buffer


@dataclass(frozen=True)
class Stack:
    """One weight matrix as `n` models hold it: `W_i = W + M_i`, each rounded once to its dtype.

    Attributes:
        matrices: `n` tensors `(out, in)`, in their stored float dtypes, which may differ.
        dtype: The dtype of every computation, float32 or float64.
        device: Where it computes; blocks are moved there as they are read.
        noise_override: Root mean square of each model's noise where it is known to be more than storage's: somebody
            added some, or rounded to fewer values than the dtype has. Empty where it is the rounding to the dtype.
    """

    matrices: tuple[Tensor, ...]
    dtype: torch.dtype
    device: torch.device
    noise_override: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        matrices: Tensor | Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        noise: Sequence[float | None] = (),
    ) -> "Stack":
        """Check the matrices and settle the compute dtype.

        Args:
            matrices: `(n, out, in)` or `n` tensors `(out, in)`, any float dtype.
            dtype: float32 or float64; by default float32 for large matrices that hold bf16 or fp16, where the storage
                noise covers its rounding, and float64 elsewhere.
            device: Where to compute; by default where the first matrix lies. See `find_device`.
            noise: Each model's, where it is known to be more than storage's, see `noise_override`; None where it is
                storage's.

        Raises:
            InputError: Not matrices of one shape, or not floating point; no such device.
        """
        tensors = tuple(W_i.detach() for W_i in matrices)
        if not tensors or not all(tensor.numel() for tensor in tensors):
            raise InputError("an empty stack: expected at least one matrix with entries, (models, out, in)")
        shape = tensors[0].shape
        for i, tensor in enumerate(tensors):
            if tensor.ndim != 2 or tensor.shape != shape:
                raise InputError(
                    f"matrix {i} has shape {tuple(tensor.shape)}, expected {tuple(shape)} as (out, in): "
                    "give one matrix per model, all of one shape"
                )
            if tensor.device != tensors[0].device:
                raise InputError(
                    f"matrix {i} is on {tensor.device}, matrix 0 on {tensors[0].device}: move them together"
                )
            if not tensor.is_floating_point():
                raise InputError(f"matrix {i} has dtype {tensor.dtype}, expected a float dtype: dequantise it first")
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"compute dtype {dtype}: expected torch.float32 or torch.float64")
        target = find_device(device if device is not None else tensors[0].device)
        stack = cls(tensors, dtype or _compute_dtype(tensors), target)
        if not any(told is not None for told in noise):
            return stack
        override = (float(own) if told is None else told for told, own in zip(noise, stack.noise, strict=True))
        return replace(stack, noise_override=tuple(override))

    def require_finite(self, witness: Tensor) -> None:
        """Name the model that holds NaN or Inf.

        A pass over big matrices only to look for NaN would cost as much as averaging them; NaN and Inf survive sums
        and products, so a solver looks at a small result instead.

        Args:
            witness: Anything computed from every entry of the stack.

        Raises:
            NonFinite: The witness is not finite.
            InputError: It is not, although every matrix is: the computation overflowed.
        """
        if bool(torch.isfinite(witness).all()):
            return
        for i, W_i in enumerate(self.matrices):
            if not bool(torch.isfinite(W_i).all()):
                raise NonFinite(i)
        raise InputError(f"the differences overflow {self.dtype}: rescale the matrices or compute in float64")

    @property
    def n(self) -> int:
        """Number of models."""
        return len(self.matrices)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.matrices[0].shape[0], self.matrices[0].shape[1]

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of computations with factors, which add up some 1e-6 of relative error in float32.

        That is far below the rounding of bf16 and fp16 and not below that of float32.
        """
        return self.dtype if all(W_i.dtype in HALVES for W_i in self.matrices) else torch.float64

    @cached_property
    def sketch_dtype(self) -> torch.dtype:
        """The dtype of sketches: bf16 where it is quicker and noise covers its rounding, the compute dtype elsewhere.

        The noise does in half-precision models with deltas of a few per cent of the weights.
        """
        if self.dtype != torch.float32 or not multiplies_bfloat16(self.device):
            return self.dtype
        rows = self.shape[0]
        reference = sample_rows(self.matrices[0]).to(self.dtype)
        for i, W_i in enumerate(self.matrices[1:], 1):
            difference = sample_rows(W_i).to(self.dtype) - reference
            rounding = noise_edge(self.shape, storage_variance(difference.bfloat16()))
            if not bool(rounding <= COVERED * torch.hypot(self.noise_norm(0, rows), self.noise_norm(i, rows))):
                return self.dtype
        return torch.bfloat16

    @cached_property
    def extremes(self) -> Tensor:
        """The least and the largest entry of each model, `(n, 2)`, float64: a quick pass, in the stored dtypes.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        ends = torch.stack([torch.stack(torch.aminmax(_comparable(W_i))).double().cpu() for W_i in self.matrices])
        self.require_finite(ends)
        return ends

    @cached_property
    def typical(self) -> Tensor:
        """The size of a typical entry of each model, `(n,)`, float64: the median of some that are not zero.

        The largest is taken where all of these are zero.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        sizes = [_median_size(W_i) for W_i in self.matrices]
        largest = self.extremes.abs().amax(dim=1).tolist()
        return torch.tensor([size or most for size, most in zip(sizes, largest, strict=True)], dtype=torch.float64)

    @cached_property
    def versions(self) -> tuple[tuple[int, ...], ...]:
        """Models that agree in every number, whatever dtype it is stored in, by the first of each group.

        Raises:
            NonFinite: A model holds NaN or Inf.
        """
        ends = [tuple(pair) for pair in self.extremes.tolist()]
        groups: list[list[int]] = []
        for i, W_i in enumerate(self.matrices):
            alike = [group for group in groups if ends[group[0]] == ends[i]]
            same = next((group for group in alike if _same_bits(self.matrices[group[0]], W_i)), None)
            if same is None:
                groups.append([i])
            else:
                same.append(i)
        return tuple(map(tuple, groups))

    def part(self, models: Sequence[int]) -> "Stack":
        """The stack of some of the models, in that order; without told noise where all of it is storage's."""
        stored = replace(self, matrices=tuple(self.matrices[i] for i in models), noise_override=())
        if not self.noise_override:
            return stored
        told = replace(stored, noise_override=tuple(self.noise_override[i] for i in models))
        return stored if torch.allclose(told.noise, stored.noise, rtol=1e-9, atol=0.0) else told

    def distance(self, i: int, j: int) -> float:
        """Mean square of the difference of two models."""
        # Blocks stay inside the processor's caches: a tenth of the time of whole matrices, and of their memory.
        blocks = self.part((i, j)).blocks()
        squares = sum(float(torch.linalg.vector_norm(block.differences, dtype=torch.float64)) ** 2 for block in blocks)
        return squares / math.prod(self.shape)

    @cached_property
    def transposed(self) -> "Stack":
        """The stack with rows and columns exchanged; nothing is copied."""
        return replace(self, matrices=tuple(W_i.mT for W_i in self.matrices))

    @property
    def by_columns(self) -> bool:
        """Whether the matrices lie in memory column by column: passes over them should go over the transposed stack."""
        return self.matrices[0].stride(0) < self.matrices[0].stride(1)

    @property
    def block_height(self) -> int:
        """Rows of a block."""
        return min(self.shape[0], max(BLOCK_ROWS, BLOCK_ENTRIES // self.shape[1]))

    def blocks(self, period: int | None = None) -> Iterator[Block]:
        """All rows, block by block. The buffer is used again: it is valid until the next block.

        Args:
            period: A multiple of the block's height. Blocks that lie a period apart come one after the other; without a
                period they come in order.
        """
        out, height = self.shape[0], self.block_height
        memory = self.zeros(self.n, height, self.shape[1])
        period = out if period is None else period
        starts = [start for first in range(0, min(period, out), height) for start in range(first, out, period)]
        runs = [slice(start, min(start + height, out)) for start in starts]
        for rows, stored in zip(runs, upload(self.matrices, runs, self.device), strict=True):
            reference = stored[0].to(self.dtype)
            block = Block(rows, reference, memory[:, : reference.shape[0]])
            for W_i, difference in zip(stored[1:], block.differences, strict=True):
                difference.copy_(W_i).sub_(reference)
            yield block

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the compute dtype, on the device."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def gaussian(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Standard normal numbers in the compute dtype, on the device."""
        return torch.randn(*shape, generator=generator, dtype=self.dtype, device=self.device)

    def generator(self, seed: int) -> torch.Generator:
        """A generator of random numbers on the device."""
        return seeded(seed, self.device)

    @cached_property
    def _variances(self) -> list[Tensor]:
        """Noise variance of some rows of each model, `(rows, in)`, float64."""
        if self.noise_override:
            return [
                torch.full_like(sample_rows(W_i), noise**2, dtype=torch.float64)
                for W_i, noise in zip(self.matrices, self.noise_override, strict=True)
            ]
        return [storage_variance(sample) for sample in as_rounded([sample_rows(W_i) for W_i in self.matrices])]

    @cached_property
    def noise(self) -> Tensor:
        """Root mean square of each model's noise, `(n,)`, float64: of storage rounding, if nothing else was told."""
        return torch.stack([variance.mean().sqrt() for variance in self._variances])

    @cached_property
    def rounded_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype that each model was rounded to, judged by some rows."""
        return tuple(sample.dtype for sample in as_rounded([sample_rows(W_i) for W_i in self.matrices]))

    @cached_property
    def balance(self) -> Balance | None:
        """The weights that make rounding even; None unless all models are in half precision."""
        if not set(self.rounded_dtypes) <= set(HALVES):
            return None
        return Balance.of(self.matrices, self.rounded_dtypes)

    def scaled(self, balance: Balance) -> "Stack":
        """The models with rows and columns multiplied, in float32 or finer: the noise is told."""
        matrices = tuple(
            W_i.to(torch.promote_types(W_i.dtype, torch.float32)) * balance.rows[:, None].to(W_i.device, torch.float32)
            for W_i in self.matrices
        )
        for W_i in matrices:
            W_i.mul_(balance.columns.to(W_i.device, torch.float32))
        return replace(self, matrices=matrices, noise_override=tuple(balance.noise.tolist()))

    def variance(self, model: int) -> Tensor:
        """Storage variance of every entry of a model, `(out, in)`, float64: a pass over all matrices."""
        if self.noise_override:
            return torch.full_like(self.matrices[model], self.noise_override[model] ** 2, dtype=torch.float64)
        return storage_variance(as_rounded(self.matrices)[model])

    def noise_norm(self, model: int, rows: int) -> Tensor:
        """Estimated spectral norm of a model's rounding error after folding onto `rows`, a float64 scalar.

        The edge of the noise, see `noise_edge`. Folding d rows onto m adds up `d / m` variances in each entry.
        """
        out, columns = self.shape
        norm: Tensor = (out / rows) ** 0.5 * noise_edge((rows, columns), self._variances[model])
        return norm


def matricise(tensor: Tensor) -> Tensor:
    """A tensor as the matrix in which a LoRA is low-rank: kernels `(out, in, h, w)` become `(out, in h w)`."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(tensor.shape[0], -1)


def _comparable(matrix: Tensor) -> Tensor:
    """A matrix in a dtype that has an order: the eighths have none."""
    return matrix if matrix.dtype.itemsize > 1 else matrix.float()


def _median_size(matrix: Tensor) -> float:
    """The median of the magnitudes of some entries, of those that are not zero; 0 where all are."""
    sizes = sample_rows(sample_rows(matrix).mT).double().abs().flatten()
    sizes = sizes[sizes > 0]
    return float(sizes.median()) if len(sizes) else 0.0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bytes are compared: some float dtypes know no equality, and zeros have signs. Of two dtypes, those in float64."""
    wide = a.dtype if a.dtype == b.dtype else torch.float64
    # Most differ in the first row already.
    return all(torch.equal(_bytes(a[rows], wide), _bytes(b[rows], wide)) for rows in (slice(1), slice(None)))


def _bytes(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype).contiguous().view(torch.uint8)


def _compute_dtype(matrices: tuple[Tensor, ...]) -> torch.dtype:
    if matrices[0].numel() <= SMALL_ENTRIES:
        return torch.float64
    samples = as_rounded([sample_rows(W_i) for W_i in matrices])
    if any(sample.dtype.itemsize > 2 for sample in samples):
        # Storing an answer in float32 gives most entries the base's own numbers, if it lies on that grid. Whether it
        # does shows in float64 alone, and an error a few per cent larger leaves twice as many entries off it.
        return torch.float64
    reference = samples[0].double()
    largest = max((sample.double() - reference).square().mean().sqrt() for sample in samples)
    noise = min(storage_variance(sample).mean().sqrt() for sample in samples)
    return torch.float32 if largest <= FLOAT32_RANGE * noise else torch.float64
