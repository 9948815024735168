"""What the two backends share: the logits transform, the row statistics, and the operations on a chunk of logits.

A chunk (n, v) holds a slice of the vocabulary, columns ``first`` to ``first + v``, of n rows. With q the softmax over
the entries *other than the target*, ∂logp/∂z = (1 − p_y)(onehot − q): nothing cancels where the target has nearly all
the probability. A chunk becomes Q = q − onehot, whose target entry is exactly −1; the factor 1 − p_y goes to the rows
of what Q is multiplied with.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_pref.opaque import argument

FLOAT32 = torch.finfo(torch.float32)
# Largest magnitude that every output dtype with an 8-bit exponent can hold.
LARGEST = float(torch.finfo(torch.bfloat16).max)
# exp(80) is the largest AlphaPO reward: squared it is finite in float64, and itself in float32.
ALPHA_CLAMP = 80.0
# Rows of ``statistics`` (4, n): maximum of z over the other entries, Σ exp(z − maximum) over them, the target's z,
# Σ z over all entries. The maximum of nothing is the least finite number, where exp(z − maximum) is 0 for z = −inf.
ROW_MAX, SUM_EXP, TARGET_LOGIT, LOGIT_SUM = range(4)
# Four rows more, (8, n), where metrics of the tokens are wanted. With q the softmax over the other entries: its entropy
# −Σ q log q and Σ q², which do not depend on the maximum; the highest z of the other entries (ROW_MAX may hold a lower
# pivot instead), the least finite number if there are none; the target's z as it came among them, −inf if it did not.
ENTROPY, SUM_SQ, HIGHEST, TARGET_SEEN = range(4, 8)
# Dtype of the token math.
ACCUMULATOR = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@argument
@dataclass(frozen=True)
class Transform:
    """z = outer · f(inner · x) of a raw logit x, f an activation by name; z = inner · x for ``"linear"``.

    Activations are listed in :mod:`fused_pref.ops.torch.chunk` and, as device code, ``ops/triton/helpers.py``.
    """

    activation: str = "linear"
    inner: float = 1.0
    outer: float = 1.0

    def __post_init__(self) -> None:
        for factor in (self.inner, self.outer):
            if not FLOAT32.tiny <= abs(factor) <= FLOAT32.max:
                names = "logit_scale, softcap and temperature"
                raise ValueError(f"{names} must have ratios that float32 can hold; got one of {factor:g}")

    @cached_property
    def nonlinear(self) -> bool:
        """Whether ∂z/∂x differs from entry to entry."""
        return self.activation != "linear"

    @cached_property
    def identity(self) -> bool:
        """Whether z = x."""
        return not self.nonlinear and self.inner == 1

    @cached_property
    def slope(self) -> float:
        """∂z/∂x where it is a constant; 1 with an activation, whose slope its backward applies to each entry."""
        return 1.0 if self.nonlinear else self.inner


@argument
@dataclass(frozen=True)
class PairTerm:
    """A weighted loss of an objective of pairs, and what enters it: by default the log-ratios of a pair.

    Attributes:
        name: of the loss.
        weight: its factor.
        smoothing: its ε; 0 where that has no effect.
        average: what enters is divided by the length.
        divergence: what enters is transformed, see :class:`PairSpec`.
        shift: what enters is less δ/β.
        matched: a sequence is compared with its entry of ``partners``, not with the other one of its pair.
    """

    name: str
    weight: float = 1.0
    smoothing: float = 0.0
    average: bool = False
    divergence: bool = False
    shift: bool = False
    matched: bool = False


@argument
@dataclass(frozen=True)
class PairSpec:
    """Validated hyperparameters of a pairwise objective.

    Attributes:
        terms: the weighted losses; the objective is the mean over pairs of their sum, and the NLL.
        beta: the factor β.
        nll_weight: of the NLL of the chosen completions; 0: not computed.
        simpo_gamma: of ``simpo``.
        alpha: what is transformed becomes −expm1(min(−α·x, 80))/α; 0: stays. It is AlphaPO's exponent, and 1 less the
            order of an α-divergence.
        nll_reduction: ``"token"`` or ``"sequence"``.
        averaged: reported log-probs are averages, and without a reference they are what enters the losses.
        tau: of ``discopop``.
        jensen_shannon: what is transformed becomes log 2 + logσ(x) instead.
    """

    terms: tuple[PairTerm, ...]
    beta: float
    nll_weight: float = 0.0
    simpo_gamma: float = 0.0
    alpha: float = 0.0
    nll_reduction: str = "token"
    averaged: bool = False
    tau: float = 1.0
    jensen_shannon: bool = False


@argument
@dataclass(frozen=True)
class UnpairedSpec:
    """Validated hyperparameters of an objective of single sequences: ``"bco"``, or a loss type of KTO."""

    loss_type: str
    beta: float
    reduction: str = "mean"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@argument
class ShiftMemory(NamedTuple):
    """State of a :class:`~fused_pref.losses.reward_shift.RewardShift`, and how a batch changes it.

    Entries are of desirable and undesirable sequences; ``running_mean`` uses the first alone, pooled over both.
    """

    mean: Tensor  # (2,) float64
    count: Tensor  # (2,) int64
    pending_sum: Tensor  # (2,) float64, of rewards gathered since the last step
    pending_count: Tensor  # (2,) int64
    kind: str
    update: str | None  # None: this batch changes nothing
    decay: float


class TargetRows(NamedTuple):
    """What rows of Q W lack: each target's entry of Q, which a caller took out, times the target's weight."""

    targets: Tensor  # (n,)
    q: Tensor  # (n,), 0 where the target is no column of the weight
    weight: Tensor  # (v, D)


class FinishedRows(NamedTuple):
    """What is known of rows whose Q is in memory, up to a factor of each row."""

    logp: Tensor  # (n,)
    one_minus_p: Tensor  # (n,) 1 − p_y
    factor: Tensor  # (n,) of Q as it lies in memory: 1 − p_y over what Q was multiplied by
    target_q: Tensor | None  # (n,) the targets' entries of that Q, which has 0 in their place; None: it has them


@dataclass(frozen=True)
class Operands:
    """What a fused product multiplies: rows of the hidden states and a slice of the weight, rows of both contiguous.

    Attributes:
        hidden: (N_total, D).
        weight: (v, D).
        bias: (v,) or None.
        indices: (N,) int64 rows of ``hidden``; None for all of them in order.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    indices: Tensor | None

    @property
    def rows(self) -> int:
        """N."""
        return self.hidden.shape[0] if self.indices is None else self.indices.shape[0]

    @property
    def columns(self) -> int:
        """Columns of this slice of the vocabulary."""
        return self.weight.shape[0]


class RowOps(Protocol):
    """Operations on a chunk of logits that is in memory, by :mod:`.torch.chunk` and :mod:`.triton.chunk`."""

    def update_statistics(
        self,
        statistics: Tensor,
        logits: Tensor,
        targets: Tensor,
        first: int,
        transform: Transform,
        *,
        logit_sum: bool,
    ) -> None:
        """Update the running statistics of rows by a chunk (online softmax).

        Args:
            statistics: (4, n), or (8, n) with metrics of the tokens, updated.
            logits: (n, v) raw logits.
            targets: (n,) labels of the rows.
            first: the chunk's first column in the vocabulary.
            transform: of the logits.
            logit_sum: whether Σ z is wanted.
        """
        ...

    def exponentials(
        self,
        out: Tensor,
        logits: Tensor,
        statistics: Tensor,
        targets: Tensor,
        transform: Transform,
        ignore_index: int,
        *,
        logit_sum: bool,
        apart: bool,
    ) -> FinishedRows:
        """Use up the raw logits of whole rows: write their Q, up to a factor of each row, into ``out``.

        ``out`` (n, V) may lie over the logits. The statistics are updated as by :meth:`update_statistics`. ``apart``:
        the targets' entries may be given apart.
        """
        ...

    def gradient(
        self, out: Tensor, logits: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform
    ) -> None:
        """Write Q of a chunk of raw logits into ``out``, which may lie over it, from the statistics of whole rows."""
        ...

    def take_targets(self, q: Tensor, targets: Tensor, first: int) -> Tensor:
        """Set the targets' entries of Q to 0 and give what they were, (n,); 0 where the target is in another chunk.

        They are the largest entries of a row. Added to the product of the rest separately, they are not rounded with
        it.
        """
        ...

    def finish(self, statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """(logp, 1 − p_y) of whole rows: (0, 0) where nothing is scored, NaN for a label outside the vocabulary."""
        ...

    def scatter_rows(
        self,
        out: Tensor,
        source: Tensor,
        factor: Tensor,
        indices: Tensor | None = None,
        target_rows: TargetRows | None = None,
    ) -> None:
        """Write (source + target rows) · factor to rows of ``out``, in the dtype of the factor and rounded once.

        Args:
            out: (P, D) contiguous; may be the source.
            source: (n, D).
            factor: (n,) contiguous, in the dtype of the token math.
            indices: (n,) rows of ``out``; None: the first n.
            target_rows: what is added to the source.
        """
        ...

    def add_target_rows(self, dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
        """Add factor_n h_n to the row of ``dw`` that is row n's target; those of one target are summed, rounded once.

        A target's part of dW is larger than the rest of its row. Summed apart, it is rounded once.

        Args:
            dw: (v, D), updated.
            h: (n, D).
            factor: (n,) in the dtype of the token math; 0 where the target is no row of ``dw``.
            targets: (n,).
        """
        ...
