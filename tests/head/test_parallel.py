"""A head whose vocabulary, or whose sequences, are split over ranks: the same numbers as one process."""

import time

import pytest
import torch
from parallel_cases import CASES, SIZES, D, S, T, evaluate, objective, parts_of, tensors
from parallel_refusals import DISAGREEMENTS
from parallel_work import CONTEXT, INTERPRETED, on_ranks, raise_on_one, two_by_two
from ranks import Raised, run_ranks
from torch import Tensor

import fused_pref as fp
from fused_pref.head.plans.shard import Shard


@pytest.mark.slow
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
    assert 0 < calls["bco in slices"].saved * calls["bco in slices"].columns < 60
    assert (calls["frozen head"].name, calls["no gradient"].name) == ("frozen_head", "logprob")


def test_collectives() -> None:
    """Four integers, three floats a token for each group, the means' D + 1; and dh in the backward."""
    counts = on_ranks(2)[0]["count_collectives"]
    integers, scored, means, dh = ("gather", 4), ("gather", 3 * 21), ("gather", D + 1), ("reduce", S * T * D)
    assert counts["cpo"] == [integers, scored, means, dh]
    groups = counts["cpo in groups"]
    assert [kind for kind, _ in groups] == ["gather", "gather", "gather", "reduce"]
    assert groups[0] == integers
    assert groups[1][1] + groups[2][1] == 3 * 21
    assert counts["bco"] == counts["frozen head"] == counts["cpo"]
    assert counts["no gradient"] == counts["cpo"][:3]
    assert counts["tokens"] == [integers, scored, dh]


def test_gradients_left_partial_are_parts_of_the_sum() -> None:
    (whole, first), (_, second) = (found["partial_gradients"] for found in on_ranks(2))
    torch.testing.assert_close(first + second, whole)
    assert (first - whole).norm() > 0.1 * whole.norm()


@pytest.mark.slow
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
        bias, small = got["placements"]
        assert bias.startswith("bias must be placed like weight, (Replicate(), Shard(dim=0)) on ")
        empty = "weight must be (V, D=24) with V >= 1"
        assert empty in small
        assert rank == 3 or small.startswith("rank 3 of tp_group refuses its arguments: ")


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


def test_context_parallel_is_one_process() -> None:
    ranks = [found["context_parallel"] for found in on_ranks(2)]
    given = {key: value.double() if value.is_floating_point() else value for key, value in tensors().items()}
    for name, function, extra, keywords in CONTEXT:
        hidden, weight = given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
        linear = function if function.startswith("linear_") else f"linear_{function}"
        others = [objective if key == "objective" else given[key] for key in extra]
        output = getattr(fp.reference, linear)(hidden, weight, given["labels"], *others, **keywords)
        (output.sum() if isinstance(output, Tensor) else output.loss).backward()
        outputs = {"values": output} if isinstance(output, Tensor) else output._asdict()
        if keywords.get("token_metrics"):
            outputs |= {name: getattr(output, name) for name in ("entropy", "accuracy", "sum_sq")}
        for got in ranks:
            for key, value in outputs.items():
                torch.testing.assert_close(got[name][key].double(), value.detach().double(), rtol=1e-5, atol=1e-5)
                assert torch.equal(got[name][key], ranks[0][name][key])
        dhidden = torch.cat([got[name]["dhidden"] for got in ranks], 1)
        dweight = sum(got[name]["dweight"] for got in ranks)
        assert (dhidden - hidden.grad).norm() <= 1e-4 * hidden.grad.norm()
        assert (dweight - weight.grad).norm() <= 1e-4 * weight.grad.norm()


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_that_disagree(kind: str) -> None:
    for told in ("refused", "disagree_again"):
        said, expected = [found[told].get(kind) for found in on_ranks(2)], DISAGREEMENTS[kind]
        if told == "refused" or said[0] is not None:
            for message, want in zip(said, (expected,) * 2 if isinstance(expected, str) else expected, strict=True):
                assert want in message
            assert isinstance(expected, tuple) or said[0] == said[1]


def test_heads_that_share_a_shape_on_one_rank() -> None:
    for found in on_ranks(2):
        losses = found["heads_that_share_a_shape"]
        assert losses[::2] == pytest.approx(losses[1::2], rel=1e-5)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["not_a_member", "no_shift"])
def test_other_refusals(name: str) -> None:
    assert [found["refused"][name] for found in on_ranks(2)] == ["refused"] * 2


def test_shards_know_their_place() -> None:
    assert Shard(None, (40, 1, 60), False, 0).vocabulary == 101
    assert Shard(None, (40, 1, 60), False, 0).largest == 60
