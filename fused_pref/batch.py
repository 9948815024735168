"""A validated batch of logits and its scores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_pref import backend, validate
from fused_pref.head.logits import TokenLogpsFunction
from fused_pref.head.ops import accumulator_dtype
from fused_pref.head.spec import LogitsSpec
from fused_pref.reductions import Scores, sequence_scores


@dataclass(frozen=True)
class LogitsBatch:
    """Validated arguments of a call on logits; ``sequences`` is S."""

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    spec: LogitsSpec
    sequences: int

    @classmethod
    def of(
        cls, logits: Tensor, labels: Tensor, keywords: Mapping[str, Any], *, pairs: bool = False, means: bool = True
    ) -> "LogitsBatch":
        """Validate; ``pairs``: S must be even; without ``means`` no mean of the logits is formed."""
        packed = keywords["cu_seqlens"] is not None
        spec = LogitsSpec.of(keywords)
        rows, symbol = ("(N_total,)", "(N_total, V)") if packed else ("(S, T)", "(S, T, V)")
        logits = validate.tensor("logits", logits, symbol, None, validate.FLOATS)
        if logits.dim() != (2 if packed else 3) or logits.shape[-1] == 0:
            raise validate.fail("logits", f"{symbol} with V >= 1", logits)
        device, shape = logits.device, logits.shape[:-1]
        labels = validate.tensor("labels", labels, rows, tuple(shape), validate.INTEGERS, device)
        cu_seqlens, sequences = None, shape[0]
        if packed:
            cu_seqlens = validate.boundaries("cu_seqlens", keywords["cu_seqlens"], shape[0], device)
            sequences = cu_seqlens.shape[0] - 1
        if pairs and sequences % 2:
            raise ValueError(f"labels must hold S = 2B sequences, chosen then rejected; got S = {sequences}")
        if spec.inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
            raise ValueError("logits must not be expanded when inplace_backward=True: their entries share memory")
        columns = logits.shape[-1]
        validate.values(
            "labels",
            labels,
            lambda y: (y == spec.ignore_index) | ((y >= 0) & (y < columns)),
            f"ignore_index = {spec.ignore_index} or in [0, V={columns})",
        )
        chosen = backend.resolve(keywords["backend"], logits.dtype, device)
        spec = replace(spec, backend=chosen, logits_mean=spec.logits_mean if means else None)
        return cls(logits, labels, cu_seqlens, spec, sequences)

    def per_sequence(self, name: str, value: Any, dtypes: tuple[torch.dtype, ...] = validate.FLOATS) -> Tensor:
        """Validate an argument with one entry per sequence, (S,), and detach it."""
        return validate.tensor(name, value, "(S,)", (self.sequences,), dtypes, self.logits.device).detach()

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Log-probs with the gradient, and means of z over the vocabulary, both shaped like the labels."""
        return TokenLogpsFunction.apply(self.logits, self.labels, self.cu_seqlens, self.spec)  # type: ignore[return-value]

    def scores(self) -> Scores:
        """Score the tokens and sum them per sequence."""
        logp, means = self.tokens()
        scores = sequence_scores(logp, means, self.labels, self.cu_seqlens, self.spec)
        validate.values("the log-prob of each sequence", scores.sums, torch.isfinite, "finite")
        return scores

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the results."""
        return accumulator_dtype(self.logits.dtype)
