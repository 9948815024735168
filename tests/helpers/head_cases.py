"""Objectives of the linear head and sizes of models, for all tests of it, and a way to force a plan."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from harness import Hidden, assert_linear_parity, reference_logps

from fused_pref.head.plans import planner as plan
from fused_pref.ops import devices

# (D, V) of Qwen2.5 0.5B, Llama 3.2 1B, Gemma 2 2B, Qwen2.5 7B, Llama 2 7B, Llama 3 8B, Mistral Nemo and Llama 3 70B.
SHAPES = (
    (896, 151936), (2048, 128256), (2304, 256000), (3584, 152064), (4096, 32000), (4096, 128256), (5120, 131072),
    (8192, 128256),
)  # fmt: skip
DESIRABLE = torch.tensor([True, False, False, True, True, False])
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpo": ("linear_cpo_loss", {}),
    "simpo": ("linear_cpo_loss", {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1}),
    "alphapo": ("linear_cpo_loss", {"loss_type": "alphapo", "alpha": 0.25}),
    "ipo": ("linear_cpo_loss", {"loss_type": "ipo", "cpo_alpha": 0.5, "nll_reduction": "sequence"}),
    "dpo": ("linear_dpo_loss", {"label_smoothing": 0.2}),
    "dpo-hinge": ("linear_dpo_loss", {"loss_type": "hinge", "beta": 0.5, "pair_normalizer": 5}),
    "bco": ("linear_bco_loss", {"delta": 0.3}),
    "bco-class": ("linear_bco_loss", {"delta": torch.tensor(-1.0), "reduction": "class_mean"}),
    "bco-batch": ("linear_bco_loss", {"delta": "running_mean"}),
    "kto": ("linear_kto_loss", {"kl": torch.tensor(2.0), "desirable_weight": 0.7}),
    "tokens": ("linear_token_logps", {}),
    "sequences": ("linear_sequence_logps", {"average": True}),
}
PLANS = ("grouped", "vocab_major", "frozen_head", "logprob")
SOFTCAP = {"softcap": 3.0, "logit_scale": -1.7, "temperature": 0.6}


def arguments(name: str, device: str = "cpu", sequences: int = 6) -> tuple[torch.Tensor, ...]:
    ref = reference_logps(sequences, device)
    both = (DESIRABLE[:sequences].to(device), ref)
    return {"linear_dpo_loss": (ref,), "linear_bco_loss": both, "linear_kto_loss": both}.get(name, ())


def parity(objective: str, batch: Hidden, *, device: str = "cpu", **keywords: Any) -> Any:
    name, own = OBJECTIVES[objective]
    own = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in own.items()}
    sequences = len(keywords["cu_seqlens"]) - 1 if "cu_seqlens" in keywords else len(batch.labels)
    return assert_linear_parity(name, batch, *arguments(name, device, sequences), **own, **keywords)


def narrowed(problem: plan.Problem) -> plan.Problem:
    """The problem on a device for which slices of 16 columns are wide, and epilogues free."""
    return replace(problem, device=replace(devices.CPU, columns=16, epilogue=0.0))


@contextlib.contextmanager
def only(
    name: str, *, small: bool = False, fused: bool = False, least: int = 5, narrow: bool = False
) -> Iterator[list[plan.Plan]]:
    """Only plans of this name and form, of which it gives those that were taken.

    The largest of them (fused, of those that save some slices), or with ``small`` the smallest whose chunks have
    ``least`` rows and columns. With ``narrow`` they are planned for the device of :func:`narrowed`.
    """
    taken: list[plan.Plan] = []

    def choose(problem: plan.Problem) -> plan.Plan:
        problem = narrowed(problem) if narrow else problem
        plans = [p.fit(problem) for p in plan.candidates(problem) if p.name == name and p.fused == fused]
        if not plans:  # the means of unscored rows
            assert not problem.gradients
            return next(p for p in plan.candidates(problem) if p.fused == fused)
        if small:
            best = min(plans, key=lambda p: (min(p.rows, p.columns) < least, p.rows * p.columns, p.saved, p.workspace))
        else:
            best = max(plans, key=lambda p: (p.fused and p.saved > 0, p.workspace))
        taken.append(best)
        return best

    with plan.planning(choose):
        yield taken
    assert taken
