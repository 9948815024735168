"""What ranks are asked to do in the tests of heads that are split over them."""

import functools
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_cases import CASES, T, evaluate, objective, parts_of, tensors
from parallel_refusals import (
    DISAGREEMENTS,
    disagree,
    disagree_again,
    heads_that_share_a_shape,
    no_shift,
    not_a_member,
)
from ranks import Raised, run_ranks
from shared import once
from torch import Tensor

import fused_pref as fp


def evaluate_all(rank: int, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    part = parts_of(dist.get_world_size())[rank]
    alone = dist.new_subgroups(1)[0]
    return {name: evaluate(name, dtype, part, tp_group=dist.group.WORLD, shift_group=alone) for name in CASES}


# Under Triton's interpreter.
INTERPRETED = ("cpo", "cpo in groups", "cpo, softcap and bias", "no gradient", "bco", "tokens", "metrics")


def everything(rank: int) -> dict[str, Any]:
    """What two or three ranks are asked in these tests, in one go: starting them takes most of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import quicken

        quicken()
    found: dict[str, Any] = {}
    if dist.get_world_size() == 2:
        found["refused"] = {kind: disagree(rank, kind) for kind in DISAGREEMENTS}
    found |= {str(dtype): evaluate_all(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}
    part = parts_of(dist.get_world_size())[rank]
    found["triton"] = {
        name: evaluate(name, torch.float32, part, tp_group=dist.group.WORLD, backend="triton") for name in INTERPRETED
    }
    if dist.get_world_size() == 3:
        return {**found, "plans": note_plans(rank), "smallest_default": smallest_default(rank)}
    works = (count_collectives, partial_gradients, dtensors, context_parallel, smallest_default)
    works += (disagree_again, heads_that_share_a_shape)
    found |= {work.__name__: work(rank) for work in works}
    found["refused"] |= {work.__name__: work(rank) for work in (not_a_member, no_shift)}
    return found


@functools.cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    ranks = once(f"on {world} ranks", lambda: run_ranks(world, everything))
    assert not any(isinstance(result, Raised) for result in ranks), ranks
    return ranks


def note_plans(rank: int) -> dict[str, Any]:
    plans: dict[str, Any] = {}
    for name in ("cpo in groups", "bco in slices", "frozen head", "no gradient"):
        taken: list[Any] = []
        evaluate(name, torch.float32, parts_of(3)[rank], taken, tp_group=dist.group.WORLD)
        (plans[name],) = taken
    return plans


def smallest_default(rank: int) -> tuple[int, Any, Tensor]:
    """Budget, plan and loss of a call without a budget on ranks whose devices differ."""
    from fused_pref.head import budget
    from fused_pref.head.plans import planner

    sizes, plans = [], []
    memory_of = budget.memory_of

    def noted(problem: Any) -> Any:
        sizes.append(problem.budget)
        plans.append(planner.choose(problem))
        return plans[-1]

    budget.memory_of = lambda device: 2**18 if rank == 1 else 2**40
    with warnings.catch_warnings(), planner.planning(noted):
        warnings.filterwarnings("ignore", message="the default budget of the linear head")
        part = parts_of(dist.get_world_size())[rank]
        loss = evaluate("cpo", torch.float32, part, tp_group=dist.group.WORLD)["loss"]
    budget.memory_of = memory_of
    assert len(plans) == 1
    return sizes[0], plans[0], loss


# What is exchanged.


def count_collectives(rank: int) -> dict[str, list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(parts: list[Tensor], value: Tensor, **kwargs: Any) -> None:
        seen.append(("gather", value.numel()))
        gather(parts, value, **kwargs)

    def all_reduce(value: Tensor, **kwargs: Any) -> None:
        seen.append(("reduce", value.numel()))
        reduce(value, **kwargs)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    counts = {}
    part = parts_of(2)[rank]
    for name in ("cpo", "cpo in groups", "bco", "frozen head", "no gradient", "tokens"):
        evaluate(name, torch.float32, part, tp_group=dist.group.WORLD)
        seen.clear()
        evaluate(name, torch.float32, part, tp_group=dist.group.WORLD)
        counts[name] = list(seen)
    return counts


def partial_gradients(rank: int) -> tuple[Tensor, Tensor]:
    part = parts_of(2)[rank]
    whole = evaluate("cpo", torch.float32, part, tp_group=dist.group.WORLD)["dhidden"]
    return whole, evaluate("cpo", torch.float32, part, tp_group=dist.group.WORLD, tp_partial=True)["dhidden"]


# Meshes and DTensors.


def two_by_two(rank: int) -> dict[str, Any]:
    """Pairs over one dimension, the vocabulary over the other; the gradient of a global mean over pairs."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data, head = mesh.get_coordinate()
    given = tensors()
    rows = [data, 2 + data]
    hidden = given["hidden"][rows].clone().requires_grad_()
    weight = given["weight"][parts_of(2)[head]].clone().requires_grad_()
    scored = (given["labels"][:2, 1:] != -100).sum()
    output = fp.linear_cpo_loss(
        hidden, weight, given["labels"][rows], tp_group=mesh["tp"], pair_normalizer=2, token_normalizer=scored
    )
    output.loss.backward()
    dist.all_reduce(weight.grad, group=mesh.get_group("dp"))
    loss = output.loss.detach().clone()
    dist.all_reduce(loss, group=mesh.get_group("dp"))
    return {"loss": loss, "dhidden": hidden.grad, "dweight": weight.grad, "placements": placements(rank)}


def placements(rank: int) -> list[str]:
    """What is said of a bias sharded over another mesh dimension than the weight, and of a shard without rows."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Rows

    given, messages = tensors(), []
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weight = distribute_tensor(given["weight"][:100], mesh, [Replicate(), Rows(0)])
    bias = distribute_tensor(given["bias"][:100], mesh, [Rows(0), Replicate()])
    small = distribute_tensor(given["weight"][:5], dist.init_device_mesh("cpu", (4,)), [Rows(0)])
    for head, shift in ((weight, bias), (small, None)):
        with pytest.raises(ValueError, match="weight") as caught:
            fp.linear_cpo_loss(given["hidden"], head, given["labels"].clamp(max=4), bias=shift)
        messages.append(str(caught.value))
    return messages


def dtensors(rank: int) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Rows

    mesh = dist.init_device_mesh("cpu", (2,))
    given = tensors()
    found: dict[str, Any] = {}
    for name, placement in (("shard", Rows(0)), ("replicate", Replicate())):
        weight = torch.nn.Parameter(distribute_tensor(given["weight"], mesh, [placement]))
        bias = torch.nn.Parameter(distribute_tensor(given["bias"], mesh, [placement]))
        hidden = given["hidden"].clone().requires_grad_()
        output = fp.linear_cpo_loss(hidden, weight, given["labels"], bias=bias)
        (output.loss * 0.7).backward()
        assert isinstance(weight.grad, DTensor)
        assert weight.grad.placements == (placement,)
        found[name] = {
            "loss": output.loss.detach(),
            "dhidden": hidden.grad,
            "dweight": weight.grad.full_tensor(),
            "dbias": bias.grad.full_tensor(),
        }
    for placement, match in ((Rows(1), "sharded along its rows"),):
        weight = distribute_tensor(given["weight"], mesh, [placement])
        with pytest.raises(ValueError, match=match):
            fp.linear_cpo_loss(given["hidden"], weight, given["labels"])
    weight = distribute_tensor(given["weight"], mesh, [Rows(0)])
    with pytest.raises(ValueError, match="tp_group must be None with a sharded DTensor"):
        fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=mesh)
    return found


# Sequences spread over ranks.


def context_parallel(rank: int) -> dict[str, dict[str, Tensor]]:
    """Rank 0 holds 4 positions, 3 of them prompt; rank 1 the rest."""
    given = tensors()
    shifted = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    part = slice(0, 4) if rank == 0 else slice(4, T)
    found = {}
    for name, function, extra, keywords in CONTEXT:
        hidden = given["hidden"][:, part].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_()
        others = [objective if key == "objective" else given[key] for key in extra]
        arguments = {"shift": False, "cp_group": dist.group.WORLD, **keywords}
        if function.startswith("linear_"):
            output = getattr(fp, function)(hidden, weight, shifted[:, part], *others, **arguments)
        else:
            output = getattr(fp, function)(hidden @ weight.T, shifted[:, part], *others, **arguments)
        loss = output.sum() if isinstance(output, Tensor) else output.loss
        loss.backward()
        outputs = {"values": output} if isinstance(output, Tensor) else output._asdict()
        if arguments.get("token_metrics"):
            outputs |= {name: getattr(output, name) for name in ("entropy", "accuracy", "sum_sq")}
        found[name] = {key: value.detach() for key, value in outputs.items()}
        found[name] |= {"dhidden": hidden.grad, "dweight": weight.grad}
    return found


CONTEXT = [
    ("cpo", "linear_cpo_loss", (), {}),
    ("simpo", "linear_cpo_loss", (), {"loss_type": "simpo", "memory_budget": 1_100_000}),
    ("bco", "linear_bco_loss", ("desirable", "ref_logps"), {"delta": 0.1}),
    ("kto", "linear_kto_loss", ("desirable", "ref_logps"), {"kl": 0.5, "desirable_weight": 1.3}),
    ("averages", "linear_sequence_logps", (), {"average": True}),
    ("own pairs", "linear_preference_loss", ("objective",), {"token_metrics": True}),
    ("cpo of logits", "cpo_loss", (), {}),
]


def raise_on_one(rank: int) -> Any:
    given = tensors()
    weight = given["weight"][parts_of(2)[rank]]
    group = dist.group.WORLD
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=group)
    if rank == 1:
        raise OverflowError("on purpose")
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=group)
    return None
