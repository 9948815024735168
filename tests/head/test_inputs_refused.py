"""Batches whose tensors do not fit each other, of logits and of hidden states, padded and packed."""

from typing import Any

import pytest
import torch
from malformed import FUNCTIONS, changed, complaint, valid

import fused_pref as fp

# One function of each kind of batch, which is validated in one place; BCO takes any number of sequences.
KINDS = {"both": ("bco_loss", "linear_bco_loss"), "logits": ("bco_loss",), "linear": ("linear_bco_loss",)}
KINDS["pairs"] = tuple(name for name in FUNCTIONS if "cpo" in name or "dpo" in name)
Row = tuple[str, dict[str, Any], type[Exception], str]


def shapes(kind: str, name: str, expected: str, changes: dict[Any, str]) -> list[Row]:
    """A row for each change of a tensor, and the shape that comes of it."""
    return [
        (
            kind,
            {name: change},
            ValueError,
            rf"^{name} must be {expected}; got an? \w+ tensor of shape \({shape}\) on cpu$",
        )
        for change, shape in changes.items()
    ]


PADDED: list[Row] = [
    *shapes(
        "logits",
        "logits",
        r"\(S, T, V\) without cu_seqlens, V >= 1",
        {
            lambda z: z[0]: "5, 11",
            lambda z: z[None]: "1, 4, 5, 11",
            lambda z: z.sum(): "",
            lambda z: z[..., :0]: "4, 5, 0",
        },
    ),
    *shapes(
        "linear",
        "hidden",
        r"\(S, T, D\) without cu_seqlens, D >= 1",
        {lambda h: h[0]: "5, 6", lambda h: h[..., :0]: "4, 5, 0"},
    ),
    *shapes(
        "linear",
        "weight",
        r"\(V, D=6\) with V >= 1, like hidden",
        {
            lambda w: w.t(): "6, 11",
            lambda w: w[:0]: "0, 6",
            lambda w: w[0]: "6,",
            lambda w: w[None]: "1, 11, 6",
            lambda w: w[:, 1:]: "11, 5",
        },
    ),
    *shapes(
        "linear",
        "bias",
        r"\(V,\) = \(11,\)",
        {lambda _: torch.zeros(10): "10,", lambda _: torch.zeros(11, 1): "11, 1", lambda _: torch.zeros(()): ""},
    ),
    *shapes(
        "both",
        "labels",
        r"\(S, T\) = \(4, 5\)",
        {
            lambda y: y.t(): "5, 4",
            lambda y: y[:3]: "3, 5",
            lambda y: y[:, 1:]: "4, 4",
            lambda y: y[..., None]: "4, 5, 1",
        },
    ),
    *shapes("both", "ref_logps", r"\(S,\) = \(4,\)", {lambda r: r[:3]: "3,", lambda r: r[:, None]: "4, 1"}),
    *shapes("both", "desirable", r"\(S,\) = \(4,\)", {lambda d: torch.cat((d, d)): "8,", lambda d: d[0]: ""}),
    *shapes("both", "sample_weight", r"\(S,\) = \(4,\)", {lambda _: torch.ones(5): "5,"}),
    (
        "both",
        {"sample_weight": torch.ones(4).long()},
        TypeError,
        r"sample_weight must be .*\(S,\); got an int64 tensor",
    ),
    ("linear", {"hidden": lambda h: h.double()}, TypeError, "weight must be a float64 tensor.*got a float32"),
    ("linear", {"weight": lambda w: w.bfloat16()}, TypeError, "weight must be a float32 tensor.*got a bfloat16"),
    ("linear", {"bias": torch.zeros(11).half()}, TypeError, r"bias must be a float32 tensor \(V,\); got a float16"),
    ("both", {"labels": lambda y: y.to("meta")}, ValueError, "labels must be on a device that holds values; got"),
    ("both", {"labels": lambda y: y.int(), "ignore_index": 2**31}, ValueError, "ignore_index.*32 bits.*got 2147483648"),
    ("both", {"cu_seqlens": torch.tensor([0, 20])}, ValueError, r"must be \(N_total, [VD]\) .*; got a float32 tensor"),
    (
        "logits",
        {"logits": lambda z: z[:1].expand(4, 5, 11), "inplace_backward": True},
        ValueError,
        "logits must not be expanded when inplace_backward=True",
    ),
    ("linear", {"memory_budget": 1}, ValueError, r"memory_budget must be at least \d+ bytes.*got 1\b"),
    ("linear", {"max_valid_tokens": 1}, ValueError, r"max_valid_tokens must be at least N = \d+; got 1"),
    ("linear", {"tp_partial": True}, ValueError, "tp_partial needs tp_group, .*; got neither"),
    (
        "pairs",
        dict.fromkeys(("logits", "hidden", "labels"), lambda x: x[:3]),
        ValueError,
        "labels .* S = 2B .*; got S = 3",
    ),
]
PACKED: list[Row] = [
    ("both", {"labels": lambda y: y[1:]}, ValueError, r"labels must be \(N_total,\) = \(14,\); got .* \(13,\)"),
    ("both", {"labels": lambda y: y[None]}, ValueError, r"labels must be \(N_total,\) = \(14,\); got .* \(1, 14\)"),
    ("logits", {"logits": lambda z: z[None]}, ValueError, r"logits must be \(N_total, V\).*got .* \(1, 14, 11\)"),
    ("linear", {"hidden": lambda h: h[None]}, ValueError, r"hidden must be \(N_total, D\).*got .* \(1, 14, 6\)"),
    ("logits", {"cu_seqlens": None}, ValueError, r"logits must be \(S, T, V\).*got .* \(14, 11\)"),
    ("linear", {"cu_seqlens": None}, ValueError, r"hidden must be \(S, T, D\).*got .* \(14, 6\)"),
    ("both", {"cu_seqlens": lambda c: c[:-1]}, ValueError, r"cu_seqlens must .* N_total = 14; got .* ending at 11"),
    ("both", {"cu_seqlens": lambda c: c.double()}, TypeError, "cu_seqlens must be an int32 or int64 .*; got a float64"),
    ("pairs", {"cu_seqlens": lambda c: c[[0, 1, 2, 4]]}, ValueError, "cu_seqlens must hold S = 2B .*; got S = 3"),
    ("both", {"ref_logps": lambda r: r[:3]}, ValueError, r"ref_logps must be \(S,\) = \(4,\); got .* \(3,\)"),
]
# Two arguments in each other's place.
SWAPPED: list[tuple[str, str, str, type[Exception], str]] = [
    ("logits", "logits", "labels", TypeError, "logits must be a float32 .*; got an int64 tensor"),
    ("linear", "hidden", "weight", ValueError, r"hidden must be \(S, T, D\).*; got a float32 tensor .* \(11, 6\)"),
    ("linear", "weight", "labels", TypeError, r"labels must be an int64 .*; got a float32 tensor .* \(11, 6\)"),
    ("linear", "hidden", "labels", TypeError, "hidden must be a float32 .*; got an int64 tensor"),
    ("both", "desirable", "ref_logps", TypeError, "desirable must be a bool .*; got a float32 tensor"),
    ("both", "labels", "desirable", TypeError, "labels must be an int64 .*; got a bool tensor"),
    ("both", "labels", "ref_logps", TypeError, "labels must be an int64 .*; got a float32 tensor"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "match", "packed"),
    [*((*row, False) for row in PADDED), *((*row, True) for row in PACKED)],
)
def test_batches(kind: str, changes: dict[str, Any], error: type[Exception], match: str, packed: bool) -> None:
    for name in KINDS[kind]:
        arguments = valid(name, packed=packed)
        own = {key: value for key, value in changes.items() if kind != "pairs" or key in arguments}
        arguments = changed({**dict.fromkeys(own), **arguments}, own)
        assert complaint(getattr(fp, name), arguments, error, match) == "", name


@pytest.mark.parametrize(("kind", "first", "second", "error", "match"), SWAPPED)
def test_swapped(kind: str, first: str, second: str, error: type[Exception], match: str) -> None:
    for name in KINDS[kind]:
        arguments = valid(name)
        swapped = {**arguments, first: arguments[second], second: arguments[first]}
        assert complaint(getattr(fp, name), swapped, error, match) == "", name
