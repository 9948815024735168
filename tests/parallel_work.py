"""What ranks are asked to do in the tests of heads that are split over them."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Raised, run_ranks
from torch import Tensor

import fused_pref as fp
from fused_pref.head import call, plan

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


# name: (function, arguments beyond hidden, weight and labels, keywords)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "cpo": ("linear_cpo_loss", (), {}),
    "cpo in groups": ("linear_cpo_loss", (), {"force": "grouped", "logits_mean": None}),
    "cpo, softcap and bias": ("linear_cpo_loss", (), {"bias": True, "softcap": 2.0, "logit_scale": 0.7}),
    "simpo, completion means": ("linear_cpo_loss", (), {"loss_type": "simpo", "logits_mean": "completion"}),
    "dpo, scale and temperature": ("linear_dpo_loss", ("ref_logps",), {"logit_scale": -0.5, "temperature": 1.5}),
    "bco": ("linear_bco_loss", ("desirable", "ref_logps"), {"delta": 0.2, "bias": True}),
    "bco, class means, delta of the batch": (
        "linear_bco_loss",
        ("desirable", "ref_logps"),
        {"delta": "ema", "reduction": "class_mean"},
    ),
    "bco in slices": ("linear_bco_loss", ("desirable", "ref_logps"), {"delta": "ema", "force": "vocab_major"}),
    "tokens": ("linear_token_logps", (), {"bias": True}),
    "sequences": ("linear_sequence_logps", (), {"average": True}),
    "bounded": ("linear_cpo_loss", (), {"max_valid_tokens": 24}),
    "frozen head": ("linear_cpo_loss", (), {"frozen": ("weight",)}),
    "frozen hidden states": ("linear_cpo_loss", (), {"frozen": ("hidden",), "bias": True}),
    "no gradient": ("linear_cpo_loss", (), {"frozen": ("hidden", "weight")}),
    "nothing scored": ("linear_cpo_loss", (), {"empty": True}),
    "packed": ("linear_cpo_loss", (), {"packed": True, "bias": True}),
}


def evaluate(name: str, dtype: torch.dtype, part: slice, **group: Any) -> dict[str, Tensor]:
    """The outputs and gradients of a case, with a slice of the vocabulary."""
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
    others = [given[key] for key in extra]
    with forced(force):
        output = getattr(fp, function)(leaves["hidden"], leaves["weight"], labels, *others, **keywords, **group)
    if isinstance(output, Tensor):
        results, loss = {"values": output}, (output * torch.linspace(0.1, 1, output.numel()).view_as(output)).sum()
    else:
        results = {key: value for key, value in output._asdict().items() if value is not None}
        loss = output.loss
    if loss.requires_grad:
        (loss * 0.7).backward()
    gradients = {f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {key: value.detach() for key, value in {**results, **gradients}.items()}


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Take the smallest plan of this name that has several groups or slices, the first of them kept."""

    def choose(problem: plan.Problem) -> plan.Plan:
        cut = [p for p in plan.candidates(problem) if len(p.bounds) > 2 or p.columns < problem.vocabulary]
        chosen = min((p for p in cut if p.name == name), key=lambda p: (p.columns < 16, p.workspace))
        return replace(chosen, kept=1) if name == "vocab_major" else chosen

    kept = call.choose, plan.TILE
    if name is not None:
        call.choose, plan.TILE = choose, 16
    try:
        yield
    finally:
        call.choose, plan.TILE = kept


def parts_of(world: int) -> list[slice]:
    ends = torch.tensor((0, *SIZES[world])).cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def evaluate_all(rank: int, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    part = parts_of(dist.get_world_size())[rank]
    alone = dist.new_subgroups(1)[0]
    return {name: evaluate(name, dtype, part, tp_group=dist.group.WORLD, shift_group=alone) for name in CASES}


# Under Triton's interpreter.
INTERPRETED = ("cpo", "cpo in groups", "cpo, softcap and bias", "no gradient", "bco", "tokens")


def everything(rank: int) -> dict[str, Any]:
    """What two or three ranks are asked in these tests, in one go: starting them takes most of the time."""
    found: dict[str, Any] = {}
    if dist.get_world_size() == 2:  # first: rows of a head that is known are not compared again
        found["refused"] = {kind: disagree(rank, kind) for kind in DISAGREEMENTS}
    found |= {str(dtype): evaluate_all(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}
    part = parts_of(dist.get_world_size())[rank]
    found["triton"] = {
        name: evaluate(name, torch.float32, part, tp_group=dist.group.WORLD, backend="triton") for name in INTERPRETED
    }
    if dist.get_world_size() == 3:
        return {**found, "plans": note_plans(rank)}
    works = (count_collectives, partial_gradients, dtensors, context_parallel)
    works += (disagree_again, heads_that_share_a_shape, rows_that_are_alike)
    found |= {work.__name__: work(rank) for work in works}
    found["refused"] |= {work.__name__: work(rank) for work in (checked_again, not_a_member, no_shift)}
    return found


@functools.cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    ranks = run_ranks(world, everything)
    assert not any(isinstance(result, Raised) for result in ranks), ranks
    return ranks


def note_plans(rank: int) -> dict[str, Any]:
    from fused_pref.head.call import HeadCall

    plans: dict[str, Any] = {}
    choose = HeadCall.plan
    for name in ("cpo in groups", "bco in slices", "frozen head", "no gradient"):

        def noted(self: HeadCall, *args: Any, name: str = name) -> Any:
            plans[name] = choose(self, *args)
            return plans[name]

        HeadCall.plan = noted
        evaluate(name, torch.float32, parts_of(3)[rank], tp_group=dist.group.WORLD)
    HeadCall.plan = choose
    return plans


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
        others = [given[key] for key in extra]
        arguments = {"shift": False, "cp_group": dist.group.WORLD, **keywords}
        if function.startswith("linear_"):
            output = getattr(fp, function)(hidden, weight, shifted[:, part], *others, **arguments)
        else:
            output = getattr(fp, function)(hidden @ weight.T, shifted[:, part], *others, **arguments)
        loss = output.sum() if isinstance(output, Tensor) else output.loss
        loss.backward()
        outputs = {"values": output} if isinstance(output, Tensor) else output._asdict()
        found[name] = {key: value.detach() for key, value in outputs.items()}
        found[name] |= {"dhidden": hidden.grad, "dweight": weight.grad}
    return found


CONTEXT = [
    ("cpo", "linear_cpo_loss", (), {}),
    ("simpo", "linear_cpo_loss", (), {"loss_type": "simpo", "memory_budget": 1_100_000}),
    ("bco", "linear_bco_loss", ("desirable", "ref_logps"), {"delta": 0.1}),
    ("averages", "linear_sequence_logps", (), {"average": True}),
    ("cpo of logits", "cpo_loss", (), {}),
]


# What is refused, on every rank.


def disagree(rank: int, kind: str) -> str:
    """What both ranks raise where rank 1, or both, ask for something else than the first call's."""
    given = tensors()
    hidden, labels, weight = given["hidden"], given["labels"].clone(), given["weight"][parts_of(2)[rank]]
    function, extra = fp.linear_cpo_loss, ()
    keywords: dict[str, Any] = {}
    if kind in ("desirable", "class counts", "sequences", "mode"):
        function, extra = fp.linear_bco_loss, (given["desirable"], given["ref_logps"])
    if kind == "mode":
        keywords["delta"] = fp.RewardShift().train(rank == 0)
    elif kind == "class counts":
        keywords = {"reduction": "class_mean", "class_normalizer": (2, torch.tensor(2.0))}
    elif kind == "boundaries":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        keywords["cu_seqlens"] = torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32)
    elif kind == "the same head":
        weight = given["weight"]
    elif kind == "overlap":
        weight = given["weight"][(slice(0, 60), slice(50, V))[rank]]
    elif kind == "overlap, the other way":
        weight = given["weight"][(slice(40, V), slice(0, 50))[rank]]
    elif kind == "one within another":
        weight = given["weight"][(slice(40, 50), slice(0, V))[rank]]
    if rank == 1:
        if kind == "D":
            hidden, weight = hidden[..., :20], weight[:, :20]
        elif kind == "dtype":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        elif kind == "N":
            labels[0, 5] = -100
        elif kind == "labels":
            labels[0, 5] += 1
        elif kind == "two labels":
            labels[0, 5] += 2
            labels[0, 6] -= 1
        elif kind == "positions":
            hidden, labels = hidden[:, :8], labels[:, :8]
        elif kind == "gradients":
            hidden = hidden.requires_grad_()
        elif kind == "function":
            function, extra = fp.linear_dpo_loss, (given["ref_logps"],)
        elif kind == "desirable":
            extra = (~given["desirable"], given["ref_logps"])
        elif kind == "class counts":
            keywords["class_normalizer"] = (2, torch.tensor(3.0))
        elif kind == "boundaries":
            keywords["cu_seqlens"] = torch.tensor([0, 9, 19, 27, 36], dtype=torch.int32)
        elif kind == "dtype of weight":
            weight = weight.bfloat16()
        elif kind == "no rows":
            weight = weight[:0]
        elif kind == "value":
            keywords["beta"] = -1.0
        elif kind == "sequences":
            extra = (given["desirable"], given["ref_logps"][:3])
        elif kind in KEYWORDS:
            keywords = {kind: KEYWORDS[kind]}
    with pytest.raises((TypeError, ValueError)) as caught:
        function(hidden, weight, labels, *extra, tp_group=dist.group.WORLD, **keywords)
    return str(caught.value)


KEYWORDS: dict[str, Any] = {
    "softcap": 3.0,
    "max_valid_tokens": 30,
    "loss_type": "simpo",
    "cpo_alpha": 0.5,
    "pair_normalizer": 4,
}
# kind: what both ranks say; where it is two, what each says
DISAGREEMENTS: dict[str, str | tuple[str, str]] = {
    "D": "ranks of tp_group must agree on D; got 24 on rank 0, 20 on rank 1",
    "dtype": "must agree on dtype; got torch.float32 on rank 0, torch.bfloat16 on rank 1",
    "N": "must agree on N; got 21 on rank 0, 20 on rank 1",
    "labels": "must agree on labels; got a int64 tensor of shape (4, 9) of checksum",
    "two labels": "must agree on labels; got",
    "positions": "must agree on the shape of labels; got (4, 9) on rank 0, (4, 8) on rank 1",
    "gradients": "must agree on which gradients are wanted; got [] on rank 0, ['hidden'] on rank 1",
    "softcap": "must agree on softcap; got None on rank 0, 3 on rank 1",
    "max_valid_tokens": "must agree on max_valid_tokens; got None on rank 0, 30 on rank 1",
    "loss_type": "must agree on loss_type; got 'sigmoid' on rank 0, 'simpo' on rank 1",
    "cpo_alpha": "must agree on cpo_alpha; got 1 on rank 0, 0.5 on rank 1",
    "pair_normalizer": "must agree on pair_normalizer; got None on rank 0, 4 on rank 1",
    "function": "must agree on the function; got 'linear_cpo_loss' on rank 0, 'linear_dpo_loss' on rank 1",
    "desirable": "must agree on desirable; got a bool tensor of shape (4,) of checksum",
    "class counts": "must agree on class_normalizer[1]; got 2.0 on rank 0, 3.0 on rank 1",
    "boundaries": "must agree on cu_seqlens; got a int32 tensor of shape (5,) of checksum",
    "the same head": "rows 0 to 100 of rank 0 are rows 0 to 100 of rank 1",
    "overlap": "rows 50 to 59 of rank 0 are rows 0 to 9 of rank 1",
    "overlap, the other way": "rows 0 to 9 of rank 0 are rows 40 to 49 of rank 1",
    "one within another": "rows 0 to 9 of rank 0 are rows 40 to 49 of rank 1",
    "dtype of weight": (
        "rank 1 of tp_group refuses its arguments: TypeError: weight must be a float32 tensor (V, D=24)",
        "weight must be a float32 tensor (V, D=24); got a bfloat16 tensor",
    ),
    "mode": "must agree on delta; got RewardShift('running_mean', update='forward') in training on rank 0",
    "value": (
        "rank 1 of tp_group refuses its arguments: ValueError: beta must be a finite number > 0; got -1.0",
        "beta must be a finite number > 0; got -1.0",
    ),
    "sequences": (
        "rank 1 of tp_group refuses its arguments: ValueError: ref_logps must be (S,) = (4,); got",
        "ref_logps must be (S,) = (4,); got",
    ),
    "no rows": (
        "rank 1 of tp_group refuses its arguments: ValueError: weight must be (V, D=24) with V >= 1",
        "weight must be (V, D=24) with V >= 1",
    ),
}


def disagree_again(rank: int) -> dict[str, str]:
    """The same, of a head that is known: labels and keywords are compared on every call."""
    return {
        kind: disagree(rank, kind)
        for kind in ("N", "two labels", "cpo_alpha", "function", "no rows", "value", "sequences")
    }


def heads_that_share_a_shape(rank: int) -> list[float]:
    """V = 101 as 51 + 50, then 102 as 51 + 51: only rank 1 sees another shape; the losses in float64 come second."""
    found = []
    for sizes in ((51, 50), (51, 51), (51, 50)):
        weight = torch.randn(sum(sizes), D, generator=torch.Generator().manual_seed(1))
        given, own = tensors(), weight.split(list(sizes))[rank]
        output = fp.linear_cpo_loss(given["hidden"], own, given["labels"], tp_group=dist.group.WORLD)
        exact = fp.reference.linear_cpo_loss(given["hidden"].double(), weight.double(), given["labels"])
        found += [output.loss.item(), exact.loss.item()]
    return found


def rows_that_are_alike(rank: int) -> float:
    """Heads as others are: of equal rows; with one row in common; whose last words copy the first; alike in columns."""
    given = tensors()
    constant = torch.ones(V, D)[parts_of(2)[rank]]
    output = fp.linear_cpo_loss(given["hidden"], constant, given["labels"], tp_group=dist.group.WORLD)
    one, copied, columns = (given["weight"].clone() for _ in range(3))
    one[[49, 100]] = 7
    copied[-2:] = copied[:2]
    columns[50:100, :16] = columns[:50, :16]
    for weight in (one, copied, columns):
        with fp.checks():
            fp.linear_cpo_loss(given["hidden"], weight[parts_of(2)[rank]], given["labels"], tp_group=dist.group.WORLD)
    return output.loss.item()


def checked_again(rank: int) -> str:
    """The rows of a known head are not compared again, but for ``fp.checks()``."""
    given = tensors()
    weight = given["weight"][parts_of(2)[rank]].clone()
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=dist.group.WORLD)
    if rank == 1:
        weight[:50] = given["weight"][:50]
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=dist.group.WORLD)
    with fp.checks(), pytest.raises(ValueError, match="must hold different rows of weight"):
        fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=dist.group.WORLD)
    return "refused"


def not_a_member(rank: int) -> str:
    group = dist.new_group([0])
    given = tensors()
    if rank == 1:
        with pytest.raises(ValueError, match="tp_group must be a group that this rank is in; rank 1 is not in it"):
            fp.linear_cpo_loss(given["hidden"], given["weight"], given["labels"], tp_group=group)
        return "refused"
    output = fp.linear_cpo_loss(given["hidden"], given["weight"], given["labels"], tp_group=group)
    assert output.loss.item() == pytest.approx(evaluate("cpo", torch.float64, slice(None))["loss"].item(), rel=1e-5)
    return "refused"


def raise_on_one(rank: int) -> Any:
    given = tensors()
    weight = given["weight"][parts_of(2)[rank]]
    group = dist.group.WORLD
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=group)
    if rank == 1:
        raise OverflowError("on purpose")
    fp.linear_cpo_loss(given["hidden"], weight, given["labels"], tp_group=group)
    return None


def no_shift(rank: int) -> str:
    given = tensors()
    with pytest.raises(ValueError, match="cp_group needs shift=False"):
        fp.linear_cpo_loss(given["hidden"], given["weight"], given["labels"], cp_group=dist.group.WORLD)
    return "refused"
