"""Validated batches, of logits or of hidden states and a weight, and their scores."""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.head import custom_ops
from fused_pref.head.autograd import (
    KnownGradientsFunction,
    KnownSlopeFunction,
    LinearTokenLogpsFunction,
    TokenLogpsFunction,
)
from fused_pref.head.engine import Objective, begin, evaluate_groups
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import GRADIENTS, Batch, HeadCall
from fused_pref.head.plans.shard import Shard
from fused_pref.head.vocab_parallel import Agreement, agreed
from fused_pref.layout import sequence_sums, targets_of, weighted, weights_of
from fused_pref.losses.scores import Scores, Tokens, mean_sums, narrow, sequence_scores
from fused_pref.ops import backend
from fused_pref.ops.interface import ACCUMULATOR
from fused_pref.outputs import PreferenceOutput
from fused_pref.ranks import group_of, sum_over_ranks
from fused_pref.spec import Spec, linear_spec, logits_spec

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Inputs(ABC):
    """What every call has; ``sequences`` is S, ``dtype`` that of the results.

    ``targets`` are the labels that the positions score, of :func:`fused_pref.layout.targets_of`, and ``weights`` the
    factors on their log-probs, of the same shape; None: 1.
    """

    targets: Tensor
    weights: Tensor | None
    cu_seqlens: Tensor | None
    spec: Spec
    cp_group: Any
    sequences: int
    dtype: torch.dtype

    def per_sequence(
        self,
        name: str,
        value: Any,
        dtypes: tuple[torch.dtype, ...] = validate.FLOATS,
        good: Callable[[Tensor], Tensor] = torch.isfinite,
        expected: str = "finite",
    ) -> Tensor:
        """Validate an argument with one entry per sequence, (S,), under ``checks`` each entry; detached, contiguous."""
        value = validate.tensor(name, value, "(S,)", (self.sequences,), dtypes, self.targets.device).detach()
        validate.values(name, value, good, expected)
        return value.contiguous()

    @abstractmethod
    def tokens(self) -> Tokens:
        """Score the tokens."""

    @property
    @abstractmethod
    def differentiable(self) -> bool:
        """Whether a gradient is wanted of any tensor."""

    def scores(self, logp: Tensor, means: Tensor) -> Scores:
        """What :meth:`tokens` gives, log-probs times their weights, summed per sequence."""
        spec, batch = self.spec, (self.targets, self.cu_seqlens)
        if spec.backend == "triton":
            scores = sequence_scores(logp, means, *batch, spec.logits_mean, spec.ignore_index)
        else:
            counts = sequence_sums(self.targets != spec.ignore_index, self.cu_seqlens).long()
            sums = sequence_sums(logp, self.cu_seqlens)
            scores = Scores(sums, counts, *mean_sums(means, counts, *batch, spec.logits_mean))
        if self.cp_group is not None:
            known = [part for part in scores if part is not None]
            summed = sum_over_ranks(torch.stack([part.double() for part in known]), self.cp_group)
            both = [total.to(part.dtype, copy=True) for total, part in zip(summed, known, strict=True)]
            scores = Scores(*both, *(None,) * (len(scores) - len(both)))
        if validate.checking():
            validate.values("the log-prob of each sequence", scores.sums, torch.isfinite, "finite")
        return scores

    def evaluate(
        self, objective: Objective, tokens: Tokens | None = None, known: tuple[Any, Tensor, Tensor] | None = None
    ) -> Any:
        """The objective's output for the tokens, scored by :meth:`tokens` if they are not given.

        ``known`` is an output that is there already, its differentiable loss, and the lengths of the sequences.
        """
        tokens = tokens or self.tokens()
        if known is None:
            logp = tokens.logp if self.weights is None else weighted(tokens.logp, self.weights)
            scores = self.scores(logp.detach(), tokens.means)
            output, slope = objective.evaluate(scores, self.spec.backend, self.dtype)
            loss = KnownSlopeFunction.apply(logp, self.cu_seqlens, output.loss, slope, self.spec.backend)
            known = output, loss, scores.counts  # type: ignore[assignment]
        output, loss, lengths = known
        kind: Any = type(output)
        output = kind(loss, *output[1:])
        output.dropped_mass = tokens.dropped
        if not isinstance(output, PreferenceOutput):  # which has them among its items
            output.lengths = lengths
        if self.spec.token_metrics:
            sums = torch.stack([sequence_sums(row, self.cu_seqlens) for row in tokens.metrics])
            if self.cp_group is not None:
                sums = sum_over_ranks(sums, self.cp_group)
            output.entropy, output.accuracy, output.sum_sq = narrow(sums / lengths.clamp(min=1), self.dtype)
        return output


@dataclass(frozen=True)
class LogitsInputs(Inputs):
    """Arguments of a call on logits, (S, T, V) or (N_total, V)."""

    logits: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, labels: Tensor, keywords: Mapping[str, Any], *, pairs: bool = False, means: bool = True
    ) -> "LogitsInputs":
        """Validate; ``pairs``: S must be even; without ``means`` no mean of the logits is formed."""
        spec, cp_group = logits_spec(keywords), keywords["cp_group"]
        if cp_group is not None:
            cp_group = _cp_group(keywords)
        batch = _batch("logits", logits, "V", labels, keywords, spec, pairs=pairs)
        logits, labels, cu_seqlens, sequences = batch
        if spec.inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError("logits must not be expanded when inplace_backward=True: their entries share memory")
        if validate.checking():
            _check_labels(labels, logits.shape[-1], spec)
        asked = {"dtype": logits.dtype, "device": logits.device, "means": means}
        spec = _resolved({"spec": spec, "metrics": keywords.get("token_metrics", False), **asked})
        targets, dtype = targets_of(labels, cu_seqlens, spec), ACCUMULATOR[logits.dtype]
        weights = keywords.get("token_weight")
        if weights is not None:
            weights = _weights(weights, labels, cu_seqlens, spec, dtype)
        return cls(targets, weights, cu_seqlens, spec, cp_group, sequences, dtype, logits)

    @property
    def differentiable(self) -> bool:
        """See :class:`Inputs`."""
        return torch.is_grad_enabled() and self.logits.requires_grad

    def tokens(self) -> Tokens:
        """See :class:`Inputs`."""
        return Tokens(*TokenLogpsFunction.apply(self.logits, self.targets, self.spec))  # type: ignore[misc]


@dataclass(frozen=True)
class LinearInputs(Inputs):
    """Arguments of a call on hidden states, (S, T, D) or (N_total, D), and a head's weight (V, D) and bias (V,).

    ``operand_dtype`` is that of the products, under autocast that of autocast; ``wanted`` are the gradients that a
    backward will need.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    operand_dtype: torch.dtype
    wanted: frozenset[str]
    agreement: Agreement | None

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
        spec, cp_group = linear_spec(keywords), keywords["cp_group"]
        bias, agreement = keywords["bias"], keywords.get("agreement")
        if cp_group is not None:
            cp_group = _cp_group(keywords)
        if bias is not None:
            validate.tensor_or_none("bias", bias, "(V,)")
        batch = _batch("hidden", hidden, "D", labels, keywords, spec, pairs=pairs)
        hidden, labels, cu_seqlens, sequences = batch
        dtype, dtypes, device = hidden.dtype, (hidden.dtype,), hidden.device.type
        # Autocast casts what enters a product, but for float64; elsewhere the dtypes must agree.
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            dtypes = tuple(each for each in validate.FLOATS if each != torch.float64)
        symbol, features = f"(V, D={hidden.shape[-1]})", hidden.shape[-1]
        weight = validate.tensor("weight", weight, symbol, None, dtypes, hidden.device)
        if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
            raise validate.fail("weight", f"{symbol} with V >= 1, like hidden", weight)
        if bias is not None:
            bias = validate.tensor("bias", bias, "(V,)", tuple(weight.shape[:1]), dtypes, hidden.device)
        if agreement is None:
            if validate.checking():
                _check_labels(labels, weight.shape[0], spec)
            if spec.tp_partial:
                raise ValueError("tp_partial needs tp_group, or a weight whose rows a DTensor shards; got neither")
        asked = {"dtype": dtype, "device": hidden.device, "means": means}
        spec = _resolved({"spec": spec, "metrics": keywords.get("token_metrics", False), **asked})
        targets, accumulator, wanted = targets_of(labels, cu_seqlens, spec), ACCUMULATOR[dtype], frozenset()
        if torch.is_grad_enabled():  # and inside of a Function it is not
            requiring = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
            wanted = frozenset(itertools.compress(GRADIENTS, requiring))
        weights = keywords.get("token_weight")
        if weights is not None:
            weights = _weights(weights, labels, cu_seqlens, spec, accumulator)
        batch = (targets, weights, cu_seqlens, spec, cp_group, sequences, accumulator)
        return cls(*batch, hidden, weight, bias, operand_dtype=dtype, wanted=wanted, agreement=agreement)

    @property
    def differentiable(self) -> bool:
        """See :class:`Inputs`."""
        return bool(self.wanted)

    def begin_call(self, unit: int) -> tuple[HeadCall, Batch]:
        """A call of the head, all arguments being valid, and its tensors; ``unit`` is as of :class:`HeadCall`."""
        shard = None if self.agreement is None else self.make_shard(self.agreement)
        # A graph skips nothing.
        spec = replace(self.spec, skip_mass=None) if torch.compiler.is_compiling() else self.spec
        call = HeadCall(spec, self.operand_dtype, self.wanted, unit, shard)
        return call, Batch(self.hidden, self.weight, self.bias, self.targets, self.cu_seqlens)

    def make_shard(self, agreement: Agreement) -> Shard:
        """This rank's shard. All ranks of a vocab-parallel head meet here first."""
        asked = {
            "D": self.weight.shape[1],
            "dtype": self.hidden.dtype,
            "the dtype of products": self.operand_dtype,
            "the dtype of weight": self.weight.dtype,
            "the shape of labels": tuple(self.targets.shape),
            "which gradients are wanted": sorted(self.wanted),
            "labels": self.targets,
        }
        sizes, budget = agreement.meet(self.weight, asked, self.targets != self.spec.ignore_index)
        _check_labels(self.targets, sum(sizes), self.spec)
        return Shard(agreement.group, sizes, self.spec.tp_partial, budget)

    def tokens(self) -> Tokens:
        """See :class:`Inputs`."""
        call, batch = self.begin_call(0)
        if torch.compiler.is_compiling():
            found: Any = custom_ops.CompiledTokenLogpsFunction.apply(call, *batch)
            return Tokens(*found)
        return Tokens(*LinearTokenLogpsFunction.apply(*batch[:4], *begin(call, batch)))  # type: ignore[misc]

    def evaluate(
        self, objective: Objective, tokens: Tokens | None = None, known: tuple[Any, Tensor, Tensor] | None = None
    ) -> Any:
        """See :class:`Inputs`; where a unit's slopes do not wait for others, the head may form gradients at once."""
        # Where sequences are spread over ranks, their slopes are known once all of them have been summed.
        unit = objective.unit if self.cp_group is None else 0
        compiling = torch.compiler.is_compiling()
        if compiling and (not unit or self.wanted <= {"hidden"}):
            return super().evaluate(objective)
        call, batch = self.begin_call(unit)
        if compiling:
            # In a graph the objective is evaluated on the whole batch.
            detached: Any = [None if tensor is None else tensor.detach() for tensor in batch]
            arguments = (Batch(*detached), self.weights, call, objective.settled())
            logp, means, metrics, *gradients = custom_ops.linear_known_gradients(*arguments)
            found = Tokens(logp, means, metrics)
            scores = self.scores(logp if self.weights is None else weighted(logp, self.weights), means)
            output, _ = objective.evaluate(scores, self.spec.backend, self.dtype)
            lengths = scores.counts
        else:
            head, rows, plan = begin(call, batch, self.weights)
            if not isinstance(plan, Grouped):
                scored: Any = LinearTokenLogpsFunction.apply(*batch[:4], head, rows, plan)
                return super().evaluate(objective, Tokens(*scored))
            found, gradients, output = evaluate_groups(head, rows, plan, self.targets, self.cu_seqlens, objective)
            lengths = rows.counts
        if call.spec.skip_mass is not None:
            found = found._replace(dropped=torch.zeros_like(found.means))
        loss = KnownGradientsFunction.apply(*batch[:3], output.loss, self.spec.backend, call.shard, *gradients)
        return super().evaluate(objective, found, (output, loss, lengths))


def on_all_ranks(function: Function) -> Function:
    """Let the ranks of a vocab-parallel head call the function together; others call it as it is."""

    @functools.wraps(function)
    def call(hidden: Any, weight: Any, labels: Any, *others: Any, **keywords: Any) -> Any:
        tensors = (hidden, weight, labels, *others)
        if keywords["tp_group"] is None and type(weight).__name__ != "DTensor":
            return function(*tensors, **keywords)
        return agreed(function, tensors, keywords)

    return cast(Function, call)


def per_call(keywords: Mapping[str, Any]) -> None:
    """Check the keywords that a :class:`Spec` does not hold: tensors, groups, ``token_metrics``."""
    for name, symbol in (
        ("cu_seqlens", "(S+1,)"),
        ("bias", "(V,)"),
        ("sample_weight", "(S,)"),
        ("token_weight", "(S, T)"),
    ):
        validate.tensor_or_none(name, keywords.get(name), symbol)
    if keywords["cp_group"] is not None:
        _cp_group(keywords)
    group_of("tp_group", keywords.get("tp_group"))
    validate.flag("token_metrics", keywords["token_metrics"])


def _weights(token_weight: Any, labels: Tensor, cu_seqlens: Tensor | None, spec: Spec, dtype: torch.dtype) -> Tensor:
    """``token_weight``, validated, where the positions are that score the labels."""
    symbol = "(S, T)" if cu_seqlens is None else "(N_total,)"
    validate.tensor_or_none("token_weight", token_weight, symbol)
    shape = tuple(labels.shape)
    value = validate.tensor("token_weight", token_weight, symbol, shape, validate.FLOATS, labels.device)
    validate.values("token_weight", value, torch.isfinite, "finite")
    return weights_of(value, cu_seqlens, spec, dtype)


def _cp_group(keywords: Mapping[str, Any]) -> Any:
    group = group_of("cp_group", keywords["cp_group"])
    if keywords["shift"] is not False:
        raise ValueError("cp_group needs shift=False: a label may belong to a position of another rank; shift first")
    return group


def _batch(
    name: str, source: Any, size: str, labels: Any, keywords: Mapping[str, Any], spec: Spec, *, pairs: bool
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Validate a tensor of one row a position, padded or packed, its labels and boundaries; also gives S."""
    cu_seqlens = keywords["cu_seqlens"]
    packed = cu_seqlens is not None
    if packed:
        validate.tensor_or_none("cu_seqlens", cu_seqlens, "(S+1,)")
    symbol = f"(N_total, {size}) with cu_seqlens" if packed else f"(S, T, {size}) without cu_seqlens"
    source = validate.tensor(name, source, symbol, None, validate.FLOATS)
    if source.dim() != (2 if packed else 3) or source.shape[-1] == 0:
        raise validate.fail(name, f"{symbol}, {size} >= 1", source)
    shape = tuple(source.shape[:-1])
    symbol = "(N_total,)" if packed else "(S, T)"
    labels = validate.tensor("labels", labels, symbol, shape, validate.INTEGERS, source.device)
    if labels.dtype == torch.int32 and not -(2**31) <= spec.ignore_index < 2**31:
        raise validate.fail("ignore_index", "an integer of 32 bits like the labels", spec.ignore_index)
    sequences = shape[0]
    if packed:
        cu_seqlens = validate.boundaries("cu_seqlens", cu_seqlens, shape[0], source.device)
        cu_seqlens = cu_seqlens.contiguous()
        sequences = cu_seqlens.shape[0] - 1
    if pairs and sequences % 2:
        name = "cu_seqlens" if packed else "labels"
        raise ValueError(f"{name} must hold S = 2B sequences, chosen then rejected; got S = {sequences}")
    return source, labels, cu_seqlens, sequences


def _check_labels(labels: Tensor, columns: int, spec: Spec) -> None:
    validate.values(
        "labels",
        labels,
        lambda y: (y == spec.ignore_index) | ((y >= 0) & (y < columns)),
        f"ignore_index = {spec.ignore_index} or in [0, V={columns})",
    )


@validate.remembered("spec", "dtype", "device", "means", "metrics")
def _resolved(asked: Mapping[str, Any]) -> Spec:
    """The spec with the backend that is chosen for tensors like these; without ``means`` no mean of the logits."""
    spec: Spec = asked["spec"]
    chosen = backend.resolve(spec.backend, asked["dtype"], asked["device"])
    metrics, means = validate.flag("token_metrics", asked["metrics"]), spec.logits_mean if asked["means"] else None
    return replace(spec, backend=chosen, logits_mean=means, token_metrics=metrics)
