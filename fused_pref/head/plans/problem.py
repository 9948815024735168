"""What a plan is chosen for, and what every plan has.

A product is 2·N·D·V operations. The workspace is what is alive beyond inputs, gradients and (S, T) results. Each plan
has a *fused* form where Triton runs: the kernel that multiplies also updates the row statistics, tile by tile, so that
no raw logits are written. It pays where passes over memory cost more than the kernel's epilogue.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor
from typing_extensions import Self

from fused_pref.head.plans.head import Gradients, Head
from fused_pref.layout import ValidRows
from fused_pref.ops.devices import Device
from fused_pref.ops.torch.chunk import padded, row_stride


@dataclass(frozen=True)
class Problem:
    """A call of the head.

    Attributes:
        tokens: N, rows to project.
        positions: of the hidden states, scored or not.
        hidden: D.
        vocabulary: V.
        itemsize: bytes of an entry of hidden states and weight as they enter the products.
        weight_itemsize: bytes of an entry of dW.
        gradients: which of ``"hidden"``, ``"weight"``, ``"bias"`` are wanted.
        local: whether the coefficients of a unit depend on that unit alone and are known in the forward.
        units: rows of each pair (or sequence) that a group must not cut; empty if not known.
        late_scale: whether dW stays float32 until the upstream gradient is known (float16, which would underflow).
        upcasts: whether products of 16-bit entries are float32 ones, of a float32 chunk (float16, and bfloat16 on CPUs
            that multiply it more slowly).
        gathered: whether the rows are copied out of the hidden states.
        unscored: rows that are projected for the means of the logits alone, before anything else.
        cast_weight: bytes of the weight's copy in the dtype of the products (autocast), 0 if none.
        fused: whether the fused kernels can be taken.
        wide_range: whether the dtype has the exponents of float32, which exponentials need.
        indexed: whether a fused product can read the rows in place.
        skip_mass: the most probability that a row's backward may leave out; None: nothing is left out.
        budget: bytes of workspace allowed.
        promised: whether the caller set the budget, which then holds or raises; if not, it gives way.
        device: constants.
        multiple: slices and groups are multiples of this, so that only the last tile of a product is cut.
        largest: rows of the largest unit; 0: that of ``units``.
        sum_itemsize: bytes of an entry of dh where it is gathered up in another dtype than its own; 0: it is not.
    """

    tokens: int
    positions: int
    hidden: int
    vocabulary: int
    itemsize: int
    weight_itemsize: int
    gradients: frozenset[str]
    local: bool
    units: tuple[int, ...]
    budget: int
    device: Device
    late_scale: bool = False
    upcasts: bool = False
    gathered: bool = True
    unscored: int = 0
    cast_weight: int = 0
    fused: bool = False
    wide_range: bool = True
    indexed: bool = False
    skip_mass: float | None = None
    multiple: int = 256
    promised: bool = True
    largest: int = 0
    sum_itemsize: int = 0

    def rounded(self) -> "Problem":
        """This problem with sizes rounded up, so that similar batches share one ranking of plans."""
        return replace(
            self,
            tokens=round_up(self.tokens),
            positions=round_up(self.positions),
            unscored=round_up(self.unscored),
            largest=round_up(self.largest_unit),
            units=(),
        )

    def means_alone(self) -> "Problem":
        """The problem of projecting the unscored rows, which comes first."""
        return replace(self, tokens=self.unscored, gradients=frozenset(), unscored=0)

    @property
    def largest_unit(self) -> int:
        """Rows of the largest unit; 0 where the units are not known."""
        return self.largest or max(self.units, default=0)

    @property
    def logits_itemsize(self) -> int:
        """Bytes of an entry of the logits at work."""
        return max(self.itemsize, 4) if self.device.mixed or self.upcasts else self.itemsize

    @property
    def narrow(self) -> bool:
        """Whether products of 16-bit entries come out in 16 bits, too; their operands then lie by rows."""
        return self.itemsize == 2 and not self.device.mixed and not self.upcasts

    @property
    def partial(self) -> int:
        """Bytes of an entry of a product that is then added in float32 (0: it is added in place)."""
        return self.itemsize if self.narrow else 0

    @property
    def operand_itemsize(self) -> int:
        """Bytes of an entry of the operands as they are multiplied."""
        return 4 if self.upcasts else self.itemsize

    def transposed(self, rows: int, columns: int) -> int:
        """Bytes of a block of logits that is copied into rows of the vocabulary for dW (bfloat16 on a CPU)."""
        turns = self.narrow and "weight" in self.gradients
        return rows * min(columns, self.device.columns) * self.itemsize if turns else 0

    def target_sums(self, rows: int, itemsize: int) -> int:
        """Bytes of the sums of the targets' parts of a dW of this itemsize, which is rounded after they are added."""
        apart = self.narrow and itemsize == 2 and "weight" in self.gradients
        return 4 * min(rows, self.vocabulary) * self.hidden if apart else 0

    @property
    def wide_hidden(self) -> int:
        """Bytes of a dh that is gathered up in another dtype than its own, beside the one that is returned."""
        return self.sum_itemsize * self.positions * self.hidden if "hidden" in self.gradients else 0

    def scratch(self, rows: int, columns: int) -> int:
        """Bytes of the blocks of elementwise work on a chunk, on the rows and on the weight, and of numbers per row.

        Before and after that, blocks of rows and of the weight, or of a 16-bit dW, may be float32 for a product.
        """
        chunk = max(rows * columns, self.positions * self.hidden)
        # The mean of the weight takes a 16th of it at a time.
        weight = min(self.vocabulary, max(64, self.vocabulary // 16)) * self.hidden
        numbers = 256 * self.positions + 8192
        work = min(self.device.scratch, max(self.itemsize, 4) * (3 * chunk + weight) + numbers)
        upcast = min(self.device.columns, rows) + min(self.device.columns, columns)
        return max(work, 4 * upcast * self.hidden + numbers) if self.upcasts else work

    def chunk(self, rows: int, columns: int, *, fused: bool = False) -> int:
        """Bytes of a chunk of logits, or ``fused`` of Q alone."""
        stride, itemsize = (padded(columns), self.itemsize) if fused else (columns, self.logits_itemsize)
        stride = row_stride(stride) if self.narrow else stride
        return self.device.allocation(rows * stride * itemsize)

    def copied(self, rows: int) -> int:
        """Bytes of gathered rows."""
        return rows * self.hidden * self.itemsize if self.gathered else 0

    def product_seconds(self, rows: int, columns: int, products: tuple[str, ...]) -> float:
        """Time of these products on ``rows`` × ``columns`` logits, weight and rows read once for each."""
        sizes = {
            "logits": (rows, columns, self.hidden),
            "hidden": (rows, self.hidden, columns),
            "weight": (columns, self.hidden, rows),
        }
        slow = max(1.0, min(self.device.columns, self.vocabulary) / columns)
        itemsize = self.operand_itemsize
        return sum(self.device.product_seconds(*sizes[product], itemsize, slow) for product in products)

    def chunk_seconds(self, rows: int, columns: int) -> float:
        """Time of a chunk's passes over memory: raw logits written, read, and written over."""
        return 3 * rows * columns * self.logits_itemsize / self.device.bandwidth

    def fused_seconds(self, rows: int, columns: int, *, written: bool) -> float:
        """Time that a fused product adds to multiplying: its epilogue, and the result if it is written."""
        moved = rows * columns * self.itemsize if written else 0
        seconds = rows * columns * self.device.epilogue + moved / self.device.bandwidth
        if self.itemsize > 2:
            # Exact products of float32 need small tiles: a quarter of cuBLAS's speed.
            seconds += 3 * self.product_seconds(rows, columns, ("logits",))
        return seconds

    def pass_seconds(self, rows: int, columns: int, *, fused: bool) -> float:
        """Time that statistics and Q of these logits add to multiplying, at once."""
        if fused:
            return self.fused_seconds(rows, columns, written=True)
        return self.chunk_seconds(rows, columns)

    @property
    def gradient_products(self) -> tuple[str, ...]:
        """Gradients that take a product each."""
        return tuple(name for name in ("hidden", "weight") if name in self.gradients)

    @property
    def gradient_names(self) -> str:
        """The gradients in words; dbias takes no product, and is named where it is alone."""
        made = {"hidden": "dh", "weight": "dW"}
        return " and ".join(made[name] for name in self.gradient_products) or "dbias"

    @property
    def one_product_forms(self) -> tuple[bool, ...]:
        """Whether statistics and Q can come from one product, unfused and fused: fused, Q waits as an exponential."""
        return (False, True) if self.fused and self.wide_range else (False,)


class Forward(NamedTuple):
    """What a forward gives.

    Attributes:
        statistics: (4, N) of the rows.
        saved: what autograd keeps for the backward.
        chunks: raw logits that the backward uses up.
        dropped: (N,) probability that the backward leaves out of each row; None where nothing is.
    """

    statistics: Tensor
    saved: tuple[Tensor, ...] = ()
    chunks: tuple[Tensor, ...] = ()
    dropped: Tensor | None = None


@dataclass(frozen=True)
class Plan(ABC):
    """How a call of the head is computed.

    Attributes:
        rows: rows of the largest group.
        columns: vocabulary columns of a slice.
        products: matrix products in units of 2·N·D·V operations.
        workspace: predicted peak bytes beyond inputs, gradients and results.
        seconds: predicted time.
        fused: whether the product that makes the logits is fused; saved slices never are.
        bounds: unit numbers at which the groups begin, and their end; empty where rows are cut anywhere.
        saved: slices of logits saved from the forward for the backward, which are one chunk.
    """

    name: ClassVar[str]
    # How often unfused logits that are not saved are made: "once", "again", or "needed" (again, for some rows).
    logits: ClassVar[str] = "once"

    rows: int
    columns: int
    products: float
    workspace: int
    seconds: float
    fused: bool = False
    bounds: tuple[int, ...] = ()
    saved: int = 0

    @classmethod
    @abstractmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """Plans of this kind for a problem, with their costs."""

    @classmethod
    @abstractmethod
    def of(cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0) -> Self:
        """The plan of these sizes, with its costs."""

    @abstractmethod
    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """What is done, in order, in words; ``unit`` is what a group must not cut, in the plural."""

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """Statistics of the rows, and what the backward needs."""
        raise NotImplementedError(f"plan {self.name} makes gradients in its forward")

    def backward(
        self, head: Head, rows: ValidRows, saved: tuple[Tensor, ...], chunks: tuple[Tensor, ...], grad_logp: Tensor
    ) -> Gradients:
        """Gradients from what :meth:`forward` saved and a = ``grad_logp`` (N,)."""
        raise NotImplementedError(f"plan {self.name} has no backward of its own")

    def fit(self, problem: Problem) -> Self:
        """This plan for a problem that is no larger than the one it was made for, with the costs that it has there."""
        return self.of(problem, self.rows, self.columns, fused=self.fused, saved=self.saved)


def round_up(size: int) -> int:
    """Up to a multiple of 1/32 of the next power of two; small numbers as they are."""
    step = 1 << max(0, size.bit_length() - 5)
    return -(-size // step) * step


def cuts(length: int, multiple: int, least: int = 1) -> list[int]:
    """Sizes of about equal parts of ``length``, the number of parts growing by a half or a third; ``multiple``s.

    None is below ``least``, unless ``length`` is.
    """
    sizes, parts = [], 1
    while parts * min(least, max(length, 1)) <= length:
        even = -(-length // parts)
        sizes.append(min(length, -(-even // multiple) * multiple) if even > multiple else even)
        parts = max(parts + 1, parts * 3 // 2 if parts & (parts - 1) == 0 else 1 << parts.bit_length())
    return sorted({*sizes, min(length, least)}, reverse=True)


def column_cuts(vocabulary: int, multiple: int) -> list[int]:
    """Columns of slices of the vocabulary, never only a few columns wide: such plans would take forever."""
    return cuts(vocabulary, multiple, min(64, max(1, vocabulary // 16)))


def rounds(length: int, size: int) -> int:
    """Parts of this size that a length takes."""
    return -(-length // max(size, 1))


def number(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
