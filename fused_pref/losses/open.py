"""An objective of the user's: a plain PyTorch function of per-sequence log-probs, its slope by autograd.

See :mod:`fused_pref.losses.pair` for what an objective is to the head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.losses.scores import Scores, gather, narrow, ratio, saturate
from fused_pref.outputs import PreferenceOutput


class Sequences(NamedTuple):
    """What an objective is a function of: n sequences, of pairs the chosen or the rejected ones.

    Attributes:
        logps: (n,) float64, the log-prob of each completion, summed over its scored tokens; with gradient. 0 for an
            empty one.
        lengths: (n,) int64, the number of scored tokens.
        ref_logps: (n,) float64, the reference model's log-probs, or None.
    """

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None

    @property
    def average(self) -> Tensor:
        """(n,) log-probs per scored token, logps / max(lengths, 1)."""
        return self.logps / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class OpenObjective:
    """An objective function with its tensors: a value that is evaluated on a batch, or on each group of its units.

    Attributes:
        function: of one or two :class:`Sequences` and the tensors; gives the loss of each unit.
        tensors: cut along their first dimension with the units; 0-d ones, and all without units, are handed whole.
        unit: sequences of a unit: 2 (a pair), 1, or 0 where the whole batch is one.
        ref_logps: (S,) or None.
        normalizer: what the sum of the losses is divided by; None: the number of units.
        wanted: whether gradients are needed.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    unit: int
    ref_logps: Tensor | None
    normalizer: float | Tensor | None
    wanted: bool

    def settled(self) -> "OpenObjective":
        """Itself: the function keeps its own state."""
        return self

    def for_parts(self, counts: Tensor) -> "OpenObjective":
        """The same, whose parts are normalised by the whole batch; counts (S,) of its scored tokens."""
        number = max(counts.shape[0] // self.unit, 1) if self.normalizer is None else self.normalizer
        return replace(self, normalizer=number)

    def part(self, members: tuple[slice, ...]) -> "OpenObjective":
        """Of these runs of sequences, from :meth:`for_parts`; the first run has the numbers of the units."""
        tensors = tuple(tensor if tensor.dim() == 0 else tensor[members[0]] for tensor in self.tensors)
        refs = None if self.ref_logps is None else gather(self.ref_logps, members)
        return replace(self, tensors=tensors, ref_logps=refs)

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> tuple[PreferenceOutput, Tensor]:
        """What is reported, in ``dtype``, and the slope ∂loss/∂sums, (S,) float64, by autograd."""
        sums, counts = scores.sums.detach(), scores.counts
        number = sums.shape[0]
        if number == 0:
            losses, total, slope = sums, sums.sum(), sums
        else:
            losses, total, slope = self._differentiate(sums, counts)
        units = number // self.unit if self.unit else 1
        divisor = max(units, 1) if self.normalizer is None else self.normalizer
        loss, slope = ratio(total, divisor), saturate(ratio(slope, divisor), dtype)
        fields: list[Any] = [narrow(losses.double(), dtype), narrow(sums, dtype), counts, _means(scores, dtype)]
        return PreferenceOutput(narrow(loss, dtype), *fields), slope

    def joined(self, parts: list[PreferenceOutput], scores: Scores, dtype: torch.dtype) -> PreferenceOutput:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        loss = narrow(torch.stack([part.loss for part in parts]).double().sum(), dtype)
        losses = torch.cat([part.losses for part in parts])
        return PreferenceOutput(loss, losses, narrow(scores.sums, dtype), scores.counts, _means(scores, dtype))

    def gather_statistics(self, sums: Tensor) -> None:
        """Nothing: the function keeps its own state."""

    def _differentiate(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the units, detached, their sum, and its derivative with respect to the sums, (S,) float64."""
        with torch.set_grad_enabled(self.wanted), torch.autocast(sums.device.type, enabled=False):
            leaf = sums.clone().requires_grad_(self.wanted)
            losses = self._call(leaf, counts)
            if not self.wanted:
                return losses.detach(), losses.double().sum(), torch.zeros_like(sums)
            if not losses.requires_grad:
                expected = "differentiable: losses that are computed from the log-probs of their arguments"
                raise ValueError(f"objective must be {expected}; got losses without a gradient")
            total = losses.double().sum()
            if validate.checking():
                self._check(leaf, counts, losses)
            (slope,) = torch.autograd.grad(total, leaf, materialize_grads=True)
        return losses.detach(), total.detach(), slope

    def _call(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The function's losses, of the shape that they must have."""
        refs = None if self.ref_logps is None else self.ref_logps.double()
        columns = (sums, counts, refs)
        if self.unit == 2:
            halves = [(None, None) if column is None else column.chunk(2) for column in columns]
            sequences = [Sequences(*half) for half in zip(*halves, strict=True)]  # type: ignore[arg-type]
        else:
            sequences = [Sequences(*columns)]
        try:
            losses = self.function(*sequences, *self.tensors)
        except (TypeError, AttributeError) as error:
            if refs is None and "NoneType" in str(error):
                raise TypeError(f"objective failed; ref_logps was not given, and is None in it: {error}") from error
            raise
        shape = (sums.shape[0] // self.unit,) if self.unit else ()
        symbol = {2: "(b,), one a pair", 1: "(s,), one a sequence", 0: "()"}[self.unit]
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise validate.fail("the losses of objective", f"a floating tensor {symbol}", losses, TypeError)
        if losses.shape != shape or losses.device != sums.device:
            symbol = f"{symbol} = {shape}" if shape else symbol
            raise validate.fail("the losses of objective", f"{symbol} on {sums.device}", losses)
        return losses

    def _check(self, leaf: Tensor, counts: Tensor, losses: Tensor) -> None:
        """Refuse gradients that would be lost, and units that look at others."""
        for node in _nodes(losses.grad_fn):
            variable = getattr(node, "variable", None)
            if variable is not None and variable is not leaf:
                came = f"one of {validate.describe(variable)}, which would be dropped"
                raise ValueError(f"objective must have no gradient but that of the log-probs; got {came}")
        units = losses.shape[0] if self.unit else 0
        if units < 2:
            return
        weights = torch.linspace(1, 2, units, dtype=leaf.dtype, device=leaf.device)
        slope = self._slope(losses, leaf, weights)
        for name, half in (("first", slice(0, units // 2)), ("second", slice(units // 2, units))):
            runs = range(0, self.unit * units, units)
            members = tuple(slice(start + half.start, start + half.stop) for start in runs)
            own = gather(leaf.detach(), members).requires_grad_()
            alone = self.part(members)._call(own, gather(counts, members))
            same = _close(alone, losses[half]) and _close(
                self._slope(alone, own, weights[half]), gather(slope, members)
            )
            if not same:
                unit = "pair" if self.unit == 2 else "sequence"
                raise ValueError(
                    f"objective must give each {unit} a loss that depends on it alone (unit={self.unit}), and always "
                    f"the same one; got other losses or slopes for the {name} half of the batch by itself. unit=None "
                    "couples the batch"
                )

    @staticmethod
    def _slope(losses: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
        """Slope of Σ weights · losses; weights differ, so that what units add to each other's slopes cannot cancel."""
        total = (losses.double() * weights).sum()
        if not total.requires_grad:
            return torch.zeros_like(leaf)
        (slope,) = torch.autograd.grad(total, leaf, retain_graph=True, materialize_grads=True)
        return slope


def _means(scores: Scores, dtype: torch.dtype) -> Tensor | None:
    """(S,) mean of the transformed logits of each sequence, 0 without a position; None where they are not known."""
    if scores.totals is None or scores.positions is None:
        return None
    return narrow(scores.totals / scores.positions.clamp(min=1), dtype)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.detach().double(), b.detach().double(), rtol=1e-6, atol=1e-9, equal_nan=True)


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of an autograd graph."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)
