"""Calls of a head, on one process or on a part of its vocabulary."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fused_pref as fp
from fused_pref.head.plans import planner as plan

S, T, D, V = 4, 9, 24, 101
SIZES = {2: (50, 51), 3: (40, 1, 60)}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (S, T), generator=generator)
    labels[:, :3] = -100
    labels[1, 6:] = -100
    labels[0, 4], labels[2, 5], labels[3, 8] = 40, 0, V - 1
    return {
        "hidden": torch.randn(S, T, D, generator=generator).to(dtype),
        "weight": (torch.randn(V, D, generator=generator) / 2).to(dtype),
        "bias": (torch.randn(V, generator=generator) / 2).to(dtype),
        "labels": labels,
        "desirable": torch.tensor([True, False, False, True]),
        "ref_logps": torch.tensor([-9.0, -8.0, -7.0, -6.0], dtype=torch.float32),
    }


def objective(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    """Of the user."""
    return torch.nn.functional.softplus(rejected.average - chosen.average)


# name: (function, arguments beyond hidden, weight and labels, keywords)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "cpo": ("linear_cpo_loss", (), {}),
    "cpo in groups": ("linear_cpo_loss", (), {"force": "grouped", "logits_mean": None}),
    "cpo, softcap and bias": ("linear_cpo_loss", (), {"bias": True, "softcap": 2.0, "logit_scale": 0.7}),
    "simpo, completion means": ("linear_cpo_loss", (), {"loss_type": "simpo", "logits_mean": "completion"}),
    "dpo, scale and temperature": ("linear_dpo_loss", ("ref_logps",), {"logit_scale": -0.5, "temperature": 1.5}),
    "mpo, delta of the batch": (
        "linear_dpo_loss",
        ("ref_logps",),
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": [0.8, 0.2, 1.0], "delta": "ema"},
    ),
    "aot": ("linear_dpo_loss", ("ref_logps",), {"loss_type": "aot", "bias": True}),
    "bco": ("linear_bco_loss", ("desirable", "ref_logps"), {"delta": 0.2, "bias": True}),
    "bco, class means, delta of the batch": (
        "linear_bco_loss",
        ("desirable", "ref_logps"),
        {"delta": "ema", "reduction": "class_mean"},
    ),
    "bco in slices": ("linear_bco_loss", ("desirable", "ref_logps"), {"delta": "ema", "force": "vocab_major"}),
    "kto": ("linear_kto_loss", ("desirable", "ref_logps"), {"kl": 0.5, "undesirable_weight": 1.3, "bias": True}),
    "tokens": ("linear_token_logps", (), {"bias": True}),
    "sequences": ("linear_sequence_logps", (), {"average": True}),
    "bounded": ("linear_cpo_loss", (), {"max_valid_tokens": 24}),
    "frozen head": ("linear_cpo_loss", (), {"frozen": ("weight",)}),
    "frozen hidden states": ("linear_cpo_loss", (), {"frozen": ("hidden",), "bias": True}),
    "no gradient": ("linear_cpo_loss", (), {"frozen": ("hidden", "weight")}),
    "nothing scored": ("linear_cpo_loss", (), {"empty": True}),
    "metrics": ("linear_cpo_loss", (), {"token_metrics": True, "softcap": 2.0}),
    "metrics in slices": ("linear_dpo_loss", ("ref_logps",), {"token_metrics": True, "loss_type": "aot"}),
    "own pairs": ("linear_preference_loss", ("objective",), {"bias": True}),
    "packed": ("linear_cpo_loss", (), {"packed": True, "bias": True}),
}


def evaluate(
    name: str, dtype: torch.dtype, part: slice, taken: list[plan.Plan] | None = None, **group: Any
) -> dict[str, Tensor]:
    """The outputs and gradients of a case, with a slice of the vocabulary; plans are added to ``taken``."""
    function, extra, keywords = CASES[name]
    keywords, given = dict(keywords), tensors(dtype)
    frozen = keywords.pop("frozen", ())
    hidden, labels = given["hidden"], given["labels"]
    if keywords.pop("empty", False):
        labels = torch.full_like(labels, -100)
    if keywords.pop("packed", False):
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        keywords["cu_seqlens"] = torch.tensor([0, 9, 9, 20, 36], dtype=torch.int32)
    if "delta" in keywords and keywords["delta"] == "ema":
        keywords["delta"] = fp.RewardShift("ema", process_group=group.pop("shift_group", None))
    group.pop("shift_group", None)
    force = keywords.pop("force", None)
    leaves = {"hidden": hidden, "weight": given["weight"][part].contiguous()}
    if keywords.get("bias"):
        leaves["bias"] = given["bias"][part].contiguous()
    leaves = {key: value.clone().requires_grad_(key not in frozen) for key, value in leaves.items()}
    if "bias" in leaves:
        keywords["bias"] = leaves["bias"]
    if dtype == torch.float64:
        keywords["backend"] = "torch"
    others = [objective if key == "objective" else given[key] for key in extra]
    with contextlib.nullcontext() if force is taken is None else forced(force, taken):
        output = getattr(fp, function)(leaves["hidden"], leaves["weight"], labels, *others, **keywords, **group)
    if isinstance(output, Tensor):
        results, loss = {"values": output}, (output * torch.linspace(0.1, 1, output.numel()).view_as(output)).sum()
    else:
        beside = {name: getattr(output, name) for name in ("entropy", "accuracy", "sum_sq")}
        results = {key: value for key, value in {**output._asdict(), **beside}.items() if value is not None}
        loss = output.loss
    if loss.requires_grad:
        (loss * 0.7).backward()
    gradients = {f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {key: value.detach() for key, value in {**results, **gradients}.items()}


@contextlib.contextmanager
def forced(name: str | None, taken: list[plan.Plan] | None) -> Iterator[None]:
    """Take the smallest plan of this name that has several groups or slices, the first of them kept; None: any."""

    def choose(problem: plan.Problem) -> plan.Plan:
        chosen = plan.choose(problem) if name is None else cut(problem)
        if taken is not None:
            taken.append(chosen)
        return chosen

    def cut(problem: plan.Problem) -> plan.Plan:
        fine = [p.fit(problem) for p in plan.candidates(replace(problem, multiple=16))]
        several = [p for p in fine if len(p.bounds) > 2 or p.columns < problem.vocabulary]
        chosen = min((p for p in several if p.name == name), key=lambda p: (p.columns < 16, p.workspace))
        return replace(chosen, saved=1) if name == "vocab_major" else chosen

    with plan.planning(choose):
        yield


def parts_of(world: int) -> list[slice]:
    ends = torch.tensor((0, *SIZES[world])).cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]
