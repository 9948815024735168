"""Validated batches, of logits or of hidden states and a weight, and their scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_pref import validate
from fused_pref.head import custom_ops
from fused_pref.head.autograd import KnownGradientsFunction, LinearTokenLogpsFunction, TokenLogpsFunction
from fused_pref.head.call import HeadCall, operand_dtype, wanted_gradients
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import Gradients, Head
from fused_pref.head.plans.problem import Plan
from fused_pref.head.plans.rows import ValidRows
from fused_pref.head.plans.shard import Shard
from fused_pref.head.spec import LinearSpec, LogitsSpec, TokenSpec
from fused_pref.head.vocab_parallel import Agreement
from fused_pref.losses.encoding import Objective, encode
from fused_pref.losses.scores import Scores, sequence_scores
from fused_pref.ops import backend
from fused_pref.ops.interface import accumulator_dtype
from fused_pref.ranks import local_head, sum_over_ranks


class Evaluated(NamedTuple):
    """An objective's result on a batch, its differentiable loss, and what ``skip_mass`` leaves out of the gradient.

    ``dropped_mass`` has the shape of the labels; None where nothing was asked for.
    """

    result: Any
    loss: Tensor
    dropped_mass: Tensor | None = None


class KnownSlopeFunction(torch.autograd.Function):
    """Attach a loss to the per-sequence sums it was computed from, by the slope that was computed with it."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        """(S,), 0-d, (S,) → 0-d; ``loss`` itself, but for a compiler, which would not see that it is changed."""
        ctx.save_for_backward(slope)
        if torch.compiler.is_compiling():
            return loss.clone()
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """0-d → (S,)."""
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None


@dataclass(frozen=True)
class Inputs(ABC):
    """What every call has; ``sequences`` is S, ``dtype`` that of the results."""

    labels: Tensor
    cu_seqlens: Tensor | None
    spec: TokenSpec
    sequences: int
    dtype: torch.dtype

    def per_sequence(self, name: str, value: Any, dtypes: tuple[torch.dtype, ...] = validate.FLOATS) -> Tensor:
        """Validate an argument with one entry per sequence, (S,), and detach it."""
        return validate.tensor(name, value, "(S,)", (self.sequences,), dtypes, self.labels.device).detach()

    @abstractmethod
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Log-probs with the gradient, and means of z over the vocabulary, both shaped like the labels."""

    def scores(self) -> Scores:
        """Log-probs of the tokens, summed per sequence, with the gradient."""
        return self._sums(*self.tokens())

    def evaluate(self, objective: Objective) -> Evaluated:
        """Score the tokens and evaluate the objective."""
        return self._evaluated(objective, self.scores())

    def _evaluated(self, objective: Objective, scores: Scores, dropped_mass: Tensor | None = None) -> Evaluated:
        result = objective.evaluate(scores._replace(sums=scores.sums.detach()), self.spec.backend, self.dtype)
        return Evaluated(result, KnownSlopeFunction.apply(scores.sums, result.loss, result.slope), dropped_mass)  # type: ignore[arg-type]

    def _sums(self, logp: Tensor, means: Tensor) -> Scores:
        spec = self.spec
        scores = sequence_scores(
            logp,
            means,
            self.labels,
            self.cu_seqlens,
            backend=spec.backend,
            logits_mean=spec.logits_mean,
            shift=spec.shift,
            ignore_index=spec.ignore_index,
        )
        if spec.cp_group is not None:
            known = [part for part in scores if part is not None]
            summed = sum_over_ranks(torch.stack([part.double() for part in known]), spec.cp_group)
            both = [total.to(part.dtype) for total, part in zip(summed, known, strict=True)]
            scores = Scores(*both, *(None,) * (len(scores) - len(both)))
        validate.values("the log-prob of each sequence", scores.sums, torch.isfinite, "finite")
        return scores


@dataclass(frozen=True)
class LogitsInputs(Inputs):
    """Arguments of a call on logits, (S, T, V) or (N_total, V)."""

    spec: LogitsSpec
    logits: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, labels: Tensor, keywords: Mapping[str, Any], *, pairs: bool = False, means: bool = True
    ) -> "LogitsInputs":
        """Validate; ``pairs``: S must be even; without ``means`` no mean of the logits is formed."""
        spec = LogitsSpec.of(keywords)
        logits = _positions("logits", logits, "V", keywords)
        if spec.inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError("logits must not be expanded when inplace_backward=True: their entries share memory")
        labels, cu_seqlens, sequences = _labels(labels, logits, keywords, spec, pairs=pairs)
        _check_labels(labels, logits.shape[-1], spec)
        spec = _resolved(spec, logits.dtype, logits.device, means=means)
        return cls(labels, cu_seqlens, spec, sequences, accumulator_dtype(logits.dtype), logits)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """See :class:`Inputs`."""
        return TokenLogpsFunction.apply(self.logits, self.labels, self.cu_seqlens, self.spec)  # type: ignore[return-value]


@dataclass(frozen=True)
class LinearInputs(Inputs):
    """Arguments of a call on hidden states, (S, T, D) or (N_total, D), and a head's weight (V, D) and bias (V,)."""

    spec: LinearSpec
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        keywords: Mapping[str, Any],
        *,
        pairs: bool = False,
        means: bool = True,
    ) -> "LinearInputs":
        """Validate; ``pairs``: S must be even; without ``means`` no mean of the logits is formed."""
        spec = LinearSpec.of(keywords)
        hidden, weight, bias = local_head(hidden, weight, keywords["bias"])
        hidden = _positions("hidden", hidden, "D", keywords)
        dtype = operand_dtype(hidden)
        weight, bias = _head(weight, bias, hidden, dtype)
        labels, cu_seqlens, sequences = _labels(labels, hidden, keywords, spec, pairs=pairs)
        if spec.tp_group is None:
            _check_labels(labels, weight.shape[0], spec)
            if spec.tp_partial:
                raise ValueError("tp_partial needs tp_group, or a weight whose rows a DTensor shards; got neither")
        spec = _resolved(spec, dtype, hidden.device, means=means)
        return cls(labels, cu_seqlens, spec, sequences, accumulator_dtype(dtype), hidden, weight, bias)

    @property
    def shard(self) -> Shard | None:
        """What this rank holds of a vocab-parallel head; None: all of it."""
        return None if self.spec.tp_group is None else self._agreed

    @cached_property
    def _agreed(self) -> Shard:
        """From the ranks, which meet when this is first asked for, after all arguments have been validated."""
        agreement: Agreement = self.spec.tp_group
        asked = {
            "D": self.weight.shape[1],
            "dtype": self.hidden.dtype,
            "the dtype of products": operand_dtype(self.hidden),
            "the dtype of weight": self.weight.dtype,
            "the shape of labels": tuple(self.labels.shape),
            "which gradients are wanted": sorted(wanted_gradients(self.hidden, self.weight, self.bias)),
            "labels": self.labels,
        }
        sizes, budget = agreement.meet(self.weight, asked, self.labels != self.spec.ignore_index)
        _check_labels(self.labels, sum(sizes), self.spec)
        return Shard(agreement.group, sizes, self.spec.tp_partial, budget)

    def call(self, objective: Objective | None) -> HeadCall:
        """What the head is asked for."""
        unit = 0 if objective is None else objective.unit
        wanted = wanted_gradients(self.hidden, self.weight, self.bias)
        return HeadCall(self.spec, operand_dtype(self.hidden), wanted, unit, self.shard)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """See :class:`Inputs`."""
        call = self.call(None)
        if torch.compiler.is_compiling():
            batch = (self.hidden, self.weight, self.bias, self.labels, self.cu_seqlens)
            return custom_ops.CompiledTokenLogpsFunction.apply(*batch, custom_ops.encode(call))  # type: ignore[return-value]
        rows = call.rows(self.labels, self.cu_seqlens)
        head = call.head(self.hidden, self.weight, self.bias)
        logp, means, _ = self._score(call, head, rows, call.plan(head, rows))
        return logp, means

    def evaluate(self, objective: Objective) -> Evaluated:
        """See :class:`Inputs`; where a unit's slopes do not wait for others, the head may form gradients at once."""
        # Where sequences are spread over ranks, their slopes are known once all of them have been summed.
        local = objective if self.spec.cp_group is None else None
        call, tensors = self.call(local), (self.hidden, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return self._evaluated_compiled(call, objective, local)
        rows = call.rows(self.labels, self.cu_seqlens)
        head = call.head(*tensors)
        plan = call.plan(head, rows)
        if not isinstance(plan, Grouped):
            logp, means, dropped = self._score(call, head, rows, plan)
            if dropped is None and self.spec.skip_mass is not None:
                dropped = torch.zeros_like(means)
            return self._evaluated(objective, self._sums(logp, means), dropped)
        with call.advising(head, rows):
            _, means, gradients, result = call.evaluate(head, rows, plan, self.labels, self.cu_seqlens, objective)
        dropped = None if self.spec.skip_mass is None else torch.zeros_like(means)
        return Evaluated(result, self._attached(result.loss, gradients), dropped)

    def _attached(self, loss: Tensor, gradients: Gradients) -> Tensor:
        tensors = (self.hidden, self.weight, self.bias)
        return KnownGradientsFunction.apply(*tensors, loss, self.spec.backend, self.shard, *gradients)  # type: ignore[return-value]

    def _score(self, call: HeadCall, head: Head, rows: ValidRows, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and means of z, shaped like the labels, and the dropped mass if there is any."""
        with call.advising(head, rows):
            return LinearTokenLogpsFunction.apply(self.hidden, self.weight, self.bias, self.labels, rows, plan, call)  # type: ignore[return-value]

    def _evaluated_compiled(self, call: HeadCall, objective: Objective, local: Objective | None) -> Evaluated:
        """The same in a graph, in which the objective is evaluated on the whole batch."""
        if local is None or not local.unit or call.wanted <= {"hidden"}:
            return self._evaluated(objective, self.scores())
        batch = (self.hidden, self.weight, self.bias, self.labels, self.cu_seqlens)
        detached = [None if tensor is None else tensor.detach() for tensor in batch]
        constants, tensors = encode(objective)
        logp, means, *parts = custom_ops.linear_known_gradients(*detached, tensors, constants, custom_ops.encode(call))
        result = objective.evaluate(self._sums(logp, means), self.spec.backend, self.dtype)
        return Evaluated(result, self._attached(result.loss, custom_ops.wanted_only(tuple(parts))))


def _positions(name: str, value: Any, size: str, keywords: Mapping[str, Any]) -> Tensor:
    """Validate a tensor of one row a position, padded or packed."""
    packed = keywords["cu_seqlens"] is not None
    symbol = f"(N_total, {size}) with cu_seqlens" if packed else f"(S, T, {size}) without cu_seqlens"
    value = validate.tensor(name, value, symbol, None, validate.FLOATS)
    if value.dim() != (2 if packed else 3) or value.shape[-1] == 0:
        raise validate.fail(name, f"{symbol}, {size} >= 1", value)
    return value


def _head(weight: Any, bias: Any, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Validate weight and bias; ``dtype`` is that of the products."""
    device, features = hidden.device, hidden.shape[-1]
    # Autocast casts what enters a product, but for float64; elsewhere the two must agree.
    casts = dtype != torch.float64 and torch.is_autocast_enabled(device.type)
    dtypes = tuple(kind for kind in validate.FLOATS if kind != torch.float64) if casts else (hidden.dtype,)
    weight = validate.tensor("weight", weight, f"(V, D={features})", None, dtypes, device)
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
        raise validate.fail("weight", f"(V, D={features}) with V >= 1, like hidden", weight)
    if bias is not None:
        bias = validate.tensor("bias", bias, "(V,)", tuple(weight.shape[:1]), dtypes, device)
    return weight, bias


def _labels(
    labels: Any, source: Tensor, keywords: Mapping[str, Any], spec: TokenSpec, *, pairs: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Validate labels and boundaries; also gives S."""
    packed, shape = keywords["cu_seqlens"] is not None, tuple(source.shape[:-1])
    symbol = "(N_total,)" if packed else "(S, T)"
    labels = validate.tensor("labels", labels, symbol, shape, validate.INTEGERS, source.device)
    if labels.dtype == torch.int32 and not -(2**31) <= spec.ignore_index < 2**31:
        raise validate.fail("ignore_index", "an integer of 32 bits like the labels", spec.ignore_index)
    cu_seqlens, sequences = None, shape[0]
    if packed:
        cu_seqlens = validate.boundaries("cu_seqlens", keywords["cu_seqlens"], shape[0], source.device)
        sequences = cu_seqlens.shape[0] - 1
    if pairs and sequences % 2:
        name = "cu_seqlens" if packed else "labels"
        raise ValueError(f"{name} must hold S = 2B sequences, chosen then rejected; got S = {sequences}")
    return labels, cu_seqlens, sequences


def _check_labels(labels: Tensor, columns: int, spec: TokenSpec) -> None:
    validate.values(
        "labels",
        labels,
        lambda y: (y == spec.ignore_index) | ((y >= 0) & (y < columns)),
        f"ignore_index = {spec.ignore_index} or in [0, V={columns})",
    )


def _resolved(spec: Any, dtype: torch.dtype, device: torch.device, *, means: bool) -> Any:
    """The spec with the backend that was chosen."""
    chosen = backend.resolve(spec.backend, dtype, device)
    return replace(spec, backend=chosen, logits_mean=spec.logits_mean if means else None)
