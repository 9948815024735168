"""Gradients of the linear head, under way in a backward and as they leave it."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_pref.head.rows import ValidRows

if TYPE_CHECKING:
    from fused_pref.head.linear import Head


class Gradients(NamedTuple):
    """Gradients of hidden states, weight and bias in their dtypes and shapes; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums(NamedTuple):
    """Where a backward from known statistics leaves what it finds, tile by tile; None where not wanted."""

    dw: Tensor | None  # (V, D), in its own dtype
    db: Tensor | None  # (V,), in the dtype of the token math
    hidden: Tensor | None  # (N, D), in the dtype of the token math: Q W, to be multiplied by −factor

    @classmethod
    def of(cls, head: "Head", rows: ValidRows, wanted: frozenset[str]) -> "Sums":
        """Memory for them, not initialised."""
        width, kind, device = head.weight.shape[1], head.accumulator, head.hidden.device
        dw = head.weight.new_empty(head.weight.shape) if "weight" in wanted else None
        db = head.weight.new_empty(head.columns, dtype=kind) if "bias" in wanted else None
        return cls(dw, db, torch.empty(rows.number, width, dtype=kind, device=device) if "hidden" in wanted else None)

    def gradients(self, head: "Head", rows: ValidRows, factor: Tensor, target_q: Tensor | None) -> Gradients:
        """The gradients, once all tiles are in; ``target_q`` as for :meth:`Head.place`."""
        dh = None
        if self.hidden is not None:
            dh = head.new_hidden_gradient()
            head.scatter_hidden(dh, rows, self.hidden, -factor, target_q)
            dh = head.reduced(dh)
        return Gradients(dh, self.dw, None if self.db is None or head.bias is None else self.db.to(head.bias.dtype))
