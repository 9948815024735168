"""The two objectives of the demo: what each needs beside logits and labels, and what its rewards are."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fused_pref as fp
from fused_pref.demo.batches import Batch
from fused_pref.demo.model import hidden_states


class Objective(Protocol):
    """An objective under training.

    Attributes:
        name: for the report.
        reward: what its reward is, for the report.
        specification: function of :mod:`fused_pref.reference` with the arguments of ``loss`` and its keywords.
    """

    name: str
    reward: str
    specification: Callable[..., Any]

    @property
    def loss(self) -> nn.Module:
        """Takes (logits, *inputs, cu_seqlens=...), packed and not to be shifted."""
        ...

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the loss takes after the logits."""
        ...

    def keywords(self) -> dict[str, Any]:
        """Keywords of ``specification``; its state, if any, is a copy."""
        ...

    def logps(self, output: Any) -> Tensor:
        """(2, B) summed log-probs of chosen and rejected completions."""
        ...

    def rewards(self, output: Any) -> Tensor:
        """(2, B) rewards of chosen and rejected completions."""
        ...


class CPO:
    """Contrastive preference optimisation, which needs no other model."""

    name = "CPO"
    reward = "beta x summed log-prob"
    specification = staticmethod(fp.reference.cpo_loss)

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.loss = fp.CPOLoss(beta=0.1, cpo_alpha=1.0, shift=False, logits_mean=None)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Labels."""
        return (batch.labels,)

    def keywords(self) -> dict[str, Any]:
        """Those of the module."""
        return self.loss.keywords

    def logps(self, output: fp.PairOutput) -> Tensor:
        """(2, B)."""
        return torch.stack((output.chosen_logps, output.rejected_logps))

    def rewards(self, output: fp.PairOutput) -> Tensor:
        """(2, B)."""
        return torch.stack((output.chosen_rewards, output.rejected_rewards))


class BCO:
    """Binary classifier optimisation against a frozen copy of the model as it is at construction."""

    name = "BCO"
    reward = "beta x (summed log-prob - that of the frozen copy)"
    specification = staticmethod(fp.reference.bco_loss)

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self.shift = fp.RewardShift("ema").to(model.device)
        self.loss = fp.BCOLoss(beta=0.1, delta=self.shift, shift=False, logits_mean=None)

    @torch.no_grad()
    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Labels, which sequences are desirable, and the frozen copy's log-probs."""
        logits = self.frozen.lm_head(hidden_states(self.frozen, batch))
        ref_logps = fp.sequence_logps(logits, batch.labels, shift=False, cu_seqlens=batch.cu_seqlens)
        desirable = torch.arange(len(ref_logps), device=ref_logps.device) < len(ref_logps) // 2
        return batch.labels, desirable, ref_logps

    def keywords(self) -> dict[str, Any]:
        """Those of the module, and a copy of the shift, since evaluating the objective moves it."""
        return {**self.loss.keywords, "delta": copy.deepcopy(self.shift)}

    def logps(self, output: fp.BCOOutput) -> Tensor:
        """(2, B)."""
        return output.logps.view(2, -1)

    def rewards(self, output: fp.BCOOutput) -> Tensor:
        """(2, B)."""
        return output.rewards.view(2, -1)


OBJECTIVES: dict[str, type[CPO] | type[BCO]] = {"cpo": CPO, "bco": BCO}
