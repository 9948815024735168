"""What ranks must refuse, on all of them: calls that disagree."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_cases import D, evaluate, parts_of, tensors

import fused_pref as fp


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
    "labels": "must agree on labels; got an int64 tensor of shape (4, 9) of checksum",
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
    "boundaries": "must agree on cu_seqlens; got an int32 tensor of shape (5,) of checksum",
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


def no_shift(rank: int) -> str:
    given = tensors()
    with pytest.raises(ValueError, match="cp_group needs shift=False"):
        fp.linear_cpo_loss(given["hidden"], given["weight"], given["labels"], cp_group=dist.group.WORLD)
    return "refused"
