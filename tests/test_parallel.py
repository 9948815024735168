"""A head whose vocabulary, or whose sequences, are split over ranks: the same numbers as one process."""

import contextlib
import functools
import itertools
import time
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
from fused_pref.head.parallel import Shard

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
    if dist.get_world_size() == 2:  # first: a shape that is known is not compared again
        found["refused"] = {kind: disagree(rank, kind) for kind in DISAGREEMENTS}
    found |= {str(dtype): evaluate_all(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}
    part = parts_of(dist.get_world_size())[rank]
    found["triton"] = {
        name: evaluate(name, torch.float32, part, tp_group=dist.group.WORLD, backend="triton") for name in INTERPRETED
    }
    if dist.get_world_size() == 3:
        return {**found, "plans": note_plans(rank)}
    found |= {work.__name__: work(rank) for work in (count_collectives, partial_gradients, dtensors, context_parallel)}
    found["refused"] |= {work.__name__: work(rank) for work in (checked_again, not_a_member, no_shift)}
    return found


@functools.cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    ranks = run_ranks(world, everything)
    assert not any(isinstance(result, Raised) for result in ranks), ranks
    return ranks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocab_parallel_is_one_process(name: str, world: int, dtype: torch.dtype) -> None:
    """Outputs within 1e-5 and gradients within 1e-4 of float64 in one process; outputs are the same on all ranks."""
    ranks = [found[str(dtype)] for found in on_ranks(world)]
    exact = evaluate(name, torch.float64, slice(None))
    if dtype == torch.bfloat16:  # of what was rounded to it
        exact = {key: value.double() for key, value in evaluate(name, torch.bfloat16, slice(None)).items()}
    bound = 1 if dtype == torch.float32 else 400
    for rank, part in enumerate(parts_of(world)):
        got = ranks[rank][name]
        assert got.keys() == exact.keys()
        for key, want in exact.items():
            value = got[key]
            if key in ("dweight", "dbias"):
                want = want[part]
            else:
                assert torch.equal(value, ranks[0][name][key]), key
            if key.startswith("d") and key != "delta":
                assert (value.double() - want).norm() <= 1e-4 * bound * exact[key].norm()
            else:
                torch.testing.assert_close(value.double(), want.double(), rtol=1e-5 * bound, atol=1e-5 * bound)


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("world", SIZES)
def test_kernels_agree(name: str, world: int) -> None:
    for found in on_ranks(world):
        assert found["triton"][name].keys() == found["torch.float32"][name].keys()
        for key, want in found["torch.float32"][name].items():
            torch.testing.assert_close(found["triton"][name][key], want, rtol=2e-5, atol=2e-5)
            if key[0] != "d" or key == "dhidden":
                assert torch.equal(found["triton"][name][key], on_ranks(world)[0]["triton"][name][key])


def test_several_groups_and_slices_were_taken() -> None:
    calls = on_ranks(3)[1]["plans"]
    assert calls["cpo in groups"].name == "grouped"
    assert len(calls["cpo in groups"].bounds) == 3
    assert calls["bco in slices"].name == "vocab_major"
    assert 0 < calls["bco in slices"].kept * calls["bco in slices"].columns < 60
    assert (calls["frozen head"].name, calls["no gradient"].name) == ("frozen_head", "logprob")


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


def test_collectives() -> None:
    """One exchange of three floats a token for each group, one of the means' D + 1, and one of dh in the backward."""
    counts = on_ranks(2)[0]["count_collectives"]
    scored, means, dh = 3 * 21, D + 1, S * T * D
    assert counts["cpo"] == [("gather", scored), ("gather", means), ("reduce", dh)]
    groups = counts["cpo in groups"]
    assert [kind for kind, _ in groups] == ["gather", "gather", "reduce"]
    assert sum(size for kind, size in groups if kind == "gather") == scored
    assert counts["bco"] == counts["frozen head"] == counts["cpo"]
    assert counts["no gradient"] == counts["cpo"][:2]
    assert counts["tokens"] == [("gather", scored), ("reduce", dh)]


def partial_gradients(rank: int) -> tuple[Tensor, Tensor]:
    part = parts_of(2)[rank]
    whole = evaluate("cpo", torch.float32, part, tp_group=dist.group.WORLD)["dhidden"]
    return whole, evaluate("cpo", torch.float32, part, tp_group=dist.group.WORLD, tp_partial=True)["dhidden"]


def test_gradients_left_partial_are_parts_of_the_sum() -> None:
    (whole, first), (_, second) = (found["partial_gradients"] for found in on_ranks(2))
    torch.testing.assert_close(first + second, whole)
    assert (first - whole).norm() > 0.1 * whole.norm()


# Meshes and DTensors.


def two_by_two(rank: int) -> dict[str, Tensor]:
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
    return {"loss": loss, "dhidden": hidden.grad, "dweight": weight.grad}


def test_two_by_two_ranks() -> None:
    ranks = run_ranks(4, two_by_two)
    exact = evaluate("cpo", torch.float64, slice(None))
    for rank, got in enumerate(ranks):
        data, head = divmod(rank, 2)
        assert got["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-5)
        want = exact["dhidden"][[data, 2 + data]] / 0.7
        assert (got["dhidden"] - want).norm() <= 1e-4 * want.norm()
        want = exact["dweight"][parts_of(2)[head]] / 0.7
        assert (got["dweight"] - want).norm() <= 1e-4 * want.norm()


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


def test_dtensor_weights() -> None:
    ranks = [found["dtensors"] for found in on_ranks(2)]
    given = {key: value.double() if value.is_floating_point() else value for key, value in tensors().items()}
    leaves = {key: given[key].requires_grad_() for key in ("hidden", "weight", "bias")}
    output = fp.reference.linear_cpo_loss(leaves["hidden"], leaves["weight"], given["labels"], bias=leaves["bias"])
    (output.loss * 0.7).backward()
    for got in ranks:
        for name in ("shard", "replicate"):
            assert got[name]["loss"].item() == pytest.approx(output.loss.item(), rel=1e-5)
            for key, leaf in leaves.items():
                assert (got[name][f"d{key}"] - leaf.grad).norm() <= 1e-4 * leaf.grad.norm()


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


def test_context_parallel_is_one_process() -> None:
    ranks = [found["context_parallel"] for found in on_ranks(2)]
    given = {key: value.double() if value.is_floating_point() else value for key, value in tensors().items()}
    for name, function, extra, keywords in CONTEXT:
        hidden, weight = given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
        linear = function if function.startswith("linear_") else f"linear_{function}"
        output = getattr(fp.reference, linear)(hidden, weight, given["labels"], *[given[k] for k in extra], **keywords)
        (output.sum() if isinstance(output, Tensor) else output.loss).backward()
        outputs = {"values": output} if isinstance(output, Tensor) else output._asdict()
        for got in ranks:
            for key, value in outputs.items():
                torch.testing.assert_close(got[name][key].double(), value.detach().double(), rtol=1e-5, atol=1e-5)
                assert torch.equal(got[name][key], ranks[0][name][key])
        dhidden = torch.cat([got[name]["dhidden"] for got in ranks], 1)
        dweight = sum(got[name]["dweight"] for got in ranks)
        assert (dhidden - hidden.grad).norm() <= 1e-4 * hidden.grad.norm()
        assert (dweight - weight.grad).norm() <= 1e-4 * weight.grad.norm()


# What is refused, on every rank.


def disagree(rank: int, kind: str) -> str:
    given = tensors()
    hidden, labels, weight = given["hidden"], given["labels"].clone(), given["weight"][parts_of(2)[rank]]
    keywords: dict[str, Any] = {}
    if rank == 1:
        if kind == "D":
            hidden, weight = hidden[..., :20], weight[:, :20]
        elif kind == "dtype":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        elif kind == "N":
            labels[0, 5] = -100
        elif kind == "labels":
            labels[0, 5] += 1
        elif kind == "positions":
            hidden, labels = hidden[:, :8], labels[:, :8]
        elif kind == "gradients":
            hidden = hidden.requires_grad_()
        elif kind == "softcap":
            keywords["softcap"] = 3.0
        elif kind == "bound":
            keywords["max_valid_tokens"] = 30
    if kind == "overlap":
        weight = given["weight"]
    with pytest.raises(ValueError, match="rank") as caught:
        fp.linear_cpo_loss(hidden, weight, labels, tp_group=dist.group.WORLD, **keywords)
    return str(caught.value)


DISAGREEMENTS = {
    "D": "ranks of tp_group must agree on D; got 24 on rank 0, 20 on rank 1",
    "dtype": "must agree on dtype; got torch.float32 on rank 0, torch.bfloat16 on rank 1",
    "N": "must agree on N; got 21 on rank 0, 20 on rank 1",
    "labels": "must agree on the labels; got labels of checksum",
    "bound": "must agree on what else the call asks for",
    "positions": "must agree on the shape of labels; got (4, 9) on rank 0, (4, 8) on rank 1",
    "gradients": "must agree on which gradients are wanted; got [] on rank 0, ['hidden'] on rank 1",
    "softcap": "must agree on what else the call asks for",
    "overlap": "ranks 0 and 1 of tp_group must hold different rows of weight",
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_that_disagree(kind: str) -> None:
    first, second = (found["refused"][kind] for found in on_ranks(2))
    assert first == second
    assert DISAGREEMENTS[kind] in first


def checked_again(rank: int) -> str:
    """A shape that is known is not compared again, but for ``fp.checks()``."""
    given = tensors()
    weight = given["weight"][parts_of(2)[rank]]
    labels = given["labels"].clone()
    fp.linear_cpo_loss(given["hidden"], weight, labels, tp_group=dist.group.WORLD)
    if rank == 1:
        labels[0, 5] = -100
    with fp.checks(), pytest.raises(ValueError, match="must agree on N"):
        fp.linear_cpo_loss(given["hidden"], weight, labels, tp_group=dist.group.WORLD)
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


def test_a_rank_that_raises_ends_the_others() -> None:
    started = time.monotonic()
    first, second = run_ranks(2, raise_on_one, seconds=5.0)
    assert second == "OverflowError: on purpose"
    assert isinstance(first, Raised)
    assert "Error" in first
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["tp_group", "cp_group"])
def test_what_is_no_group(name: str) -> None:
    given = tensors()
    arguments = (given["hidden"], given["weight"], given["labels"])
    with pytest.raises(TypeError, match=f"{name} must be a torch.distributed.ProcessGroup, a 1-d DeviceMesh or None"):
        fp.linear_cpo_loss(*arguments, shift=False, **{name: object()})


def no_shift(rank: int) -> str:
    given = tensors()
    with pytest.raises(ValueError, match="cp_group needs shift=False"):
        fp.linear_cpo_loss(given["hidden"], given["weight"], given["labels"], cp_group=dist.group.WORLD)
    return "refused"


@pytest.mark.parametrize("name", ["checked_again", "not_a_member", "no_shift"])
def test_other_refusals(name: str) -> None:
    assert [found["refused"][name] for found in on_ranks(2)] == ["refused"] * 2


def test_shards_know_their_place() -> None:
    assert Shard(None, (40, 1, 60), False).vocabulary == 101
    assert Shard(None, (40, 1, 60), False).largest == 60
