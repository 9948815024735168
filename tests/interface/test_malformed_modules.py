"""Malformed constructions and calls of the loss modules."""

from typing import Any

import pytest
import torch
from malformed import GROUPS, changed, complaint, valid

import fused_pref as fp

NAN, INF = float("nan"), float("inf")
META = torch.tensor(1.0, device="meta")
MODULES = {
    "cpo_loss": fp.CPOLoss,
    "dpo_loss": fp.DPOLoss,
    "bco_loss": fp.BCOLoss,
    "linear_cpo_loss": fp.LinearCPOLoss,
    "linear_dpo_loss": fp.LinearDPOLoss,
    "linear_bco_loss": fp.LinearBCOLoss,
}
GROUP = {group: [name for name in names if name in MODULES] for group, names in GROUPS.items()}

# group, keyword, value, error, message after the keyword
CONSTRUCTION: list[tuple[str, str, Any, type[Exception], str]] = [
    ("all", "backend", "cuda", ValueError, "one of .*got 'cuda'"),
    ("all", "backend", None, ValueError, "one of .*got None"),
    ("all", "ignore_index", 2**63, ValueError, "an integer of 64 bits.*got 9223372036854775808"),
    ("all", "shift", 1, TypeError, "True or False; got 1"),
    ("all", "softcap", -1.0, ValueError, "> 0; got -1.0"),
    ("all", "logit_scale", 0.0, ValueError, "other than 0; got 0.0"),
    ("all", "logits_mean", "mean", ValueError, "one of .*got 'mean'"),
    ("all", "cp_group", "world", TypeError, "ProcessGroup.*got 'world'"),
    ("all", "cu_seqlens", [0, 5], TypeError, r"a tensor \(S\+1,\) or None; got \[0, 5\]"),
    ("all", "beta", None, TypeError, "got None"),
    ("all", "beta", 10**400, ValueError, "> 0; got 1000"),
    ("pairs", "pair_normalizer", -1, ValueError, "> 0; got -1"),
    ("pairs", "pair_normalizer", torch.ones(1), ValueError, "0-d tensor > 0; got a float32 tensor"),
    ("pairs", "token_normalizer", "4", TypeError, ">= 0; got '4'"),
    ("pairs", "token_normalizer", META, ValueError, "holds values; got .*on meta"),
    ("pairs", "label_smoothing", 1, ValueError, r"in \[0, 1\); got 1"),
    ("cpo", "cpo_alpha", -1, ValueError, ">= 0; got -1"),
    ("cpo", "loss_type", "dpo", ValueError, "one of .*got 'dpo'"),
    ("dpo", "loss_type", "simpo", ValueError, "one of .*got 'simpo'"),
    ("bco", "delta", "0.1", TypeError, "a RewardShift, .*got '0.1'"),
    ("bco", "delta", NAN, ValueError, "a RewardShift, .*got nan"),
    ("bco", "delta", torch.zeros(4), ValueError, r"0-d floating tensor; got a float32 tensor of shape \(4,\)"),
    ("bco", "delta", fp.RewardShift, TypeError, "a RewardShift, .*got <class"),
    ("bco", "reduction", "sum", ValueError, "one of .*got 'sum'"),
    ("bco", "sample_weight", [1.0] * 4, TypeError, r"a tensor \(S,\) or None; got \[1.0"),
    ("bco", "sequence_normalizer", 0, ValueError, "> 0; got 0"),
    ("bco", "class_normalizer", (1, 2), ValueError, "needs reduction=.*got reduction='mean'"),
    ("linear", "bias", [0.0], TypeError, r"a tensor \(V,\) or None; got \[0.0\]"),
    ("linear", "memory_budget", 0, ValueError, ">= 1, or None; got 0"),
    ("linear", "max_valid_tokens", 1.5, TypeError, "an integer; got 1.5"),
    ("linear", "skip_mass", INF, ValueError, r"\[0, 1\); got inf"),
    ("linear", "tp_group", 0, TypeError, "ProcessGroup.*got 0"),
    ("linear", "tp_partial", "no", TypeError, "True or False; got 'no'"),
    ("logits", "inplace_backward", 1, TypeError, "True or False; got 1"),
]
FOREIGN = [("all", "betta"), ("logits", "memory_budget"), ("linear", "inplace_backward"), ("dpo", "cpo_alpha")]
FOREIGN += [("cpo", "delta"), ("bco", "label_smoothing"), ("pairs", "ref_logps"), ("all", "labels")]

# group, changes of a call, error, message
CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("all", {"labels": lambda y: y[:, 1:]}, ValueError, r"labels must be \(S, T\) = \(4, 5\); got .* \(4, 4\)"),
    ("all", {"labels": lambda y: y.tolist()}, TypeError, "labels must be a int64 or int32 tensor"),
    ("logits", {"logits": None}, TypeError, "logits must be a float32 .*; got None"),
    ("linear", {"weight": lambda w: w.t()}, ValueError, r"weight must be \(V, D=6\).*; got .* \(6, 11\)"),
    ("linear", {"bias": torch.zeros(3)}, ValueError, r"bias must be \(V,\) = \(11,\); got .* \(3,\)"),
    ("all", {"cu_seqlens": torch.tensor([0, 20])}, ValueError, r"must be \(N_total, [VD]\) .*; got a float32 tensor"),
    ("all", {"cu_seqlens": (0, 20)}, TypeError, r"cu_seqlens must be a tensor .*; got \(0, 20\)"),
    ("pairs", {"pair_normalizer": NAN}, ValueError, "pair_normalizer must be .*; got nan"),
    ("pairs", {"token_normalizer": True}, TypeError, "token_normalizer must be .*; got True"),
    ("bco", {"sample_weight": 1.0}, TypeError, "sample_weight must be .*; got 1.0"),
    ("bco", {"class_normalizer": (1, 1)}, ValueError, "class_normalizer needs .*; got reduction='mean'"),
    ("bco", {"sequence_normalizer": torch.ones(1)}, ValueError, "sequence_normalizer must be .*; got a float32"),
    ("bco", {"desirable": [True] * 4}, TypeError, r"desirable must be .*; got \[True"),
    ("referenced", {"ref_logps": None}, TypeError, "ref_logps must be .*; got None"),
    ("all", {"beta": 0.1}, TypeError, r"forward\(\) got an unexpected keyword argument 'beta'"),
    ("all", {"ignore_index": 0}, TypeError, r"forward\(\) got an unexpected keyword argument 'ignore_index'"),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_unchanged_call_is_valid(name: str) -> None:
    module = MODULES[name]()
    assert module(*valid(name).values()).loss.isfinite()
    number = len(valid(name)) + 1
    with pytest.raises(TypeError, match=rf"forward\(\) takes {number} positional arguments but {number + 1} were"):
        module(*valid(name).values(), None)
    with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument"):
        module(*list(valid(name).values())[:-1])
    with pytest.raises(TypeError, match=r"__init__\(\) takes 1 positional argument but 2 were given"):
        MODULES[name](0.1)


@pytest.mark.parametrize(("group", "keyword", "value", "error", "match"), CONSTRUCTION)
def test_construction(group: str, keyword: str, value: Any, error: type[Exception], match: str) -> None:
    for name in GROUP[group]:
        assert complaint(MODULES[name], {keyword: value}, error, rf"{keyword}\b.*{match}") == ""


@pytest.mark.parametrize(("group", "keyword"), FOREIGN)
def test_unknown_keywords(group: str, keyword: str) -> None:
    for name in GROUP[group]:
        match = rf"Loss.__init__\(\) got an unexpected keyword argument '{keyword}'"
        assert complaint(MODULES[name], {keyword: 0.1}, TypeError, match) == ""


@pytest.mark.parametrize(("group", "changes", "error", "match"), CALLS)
def test_calls(group: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    for name in GROUP[group]:
        assert complaint(MODULES[name](), changed(valid(name), changes), error, match) == ""
