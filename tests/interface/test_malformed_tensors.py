"""Malformed tensors: each message names the argument, what was expected and what came."""

from typing import Any

import numpy as np
import pytest
import torch
from malformed import Row, complaint, complaints, each, names, valid

import fused_pref as fp

# PyTorch's own words of tensors that are refused.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
NAN = float("nan")


def other_tensors(symbol: str) -> list[Any]:
    """What no tensor argument takes."""
    return [
        (lambda x: x.tolist(), TypeError, rf"tensor {symbol}.*; got \["),
        (lambda x: x.numpy(), TypeError, rf"tensor {symbol}.*; got array\("),
        (None, TypeError, rf"tensor {symbol}.*; got None"),
        ("x", TypeError, rf"tensor {symbol}.*; got 'x'"),
        (3, TypeError, rf"tensor {symbol}.*; got 3"),
        (lambda x: x.to(torch.complex64), TypeError, rf"tensor {symbol}.*; got a complex64 tensor"),
        (lambda x: x.to(torch.uint8), TypeError, rf"tensor {symbol}.*; got a uint8 tensor"),
        (lambda x: x.to("meta"), ValueError, "a device that holds values; got .* on meta"),
        (lambda x: x.to_sparse(), TypeError, "dense; got layout torch.sparse_coo: call .to_dense"),
        (
            lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
            TypeError,
            "dense; got a qint8 tensor.*: call .dequantize",
        ),
        (lambda x: torch.nested.nested_tensor([x]), TypeError, r"dense; got a \w+ tensor nested on cpu: pack"),
    ]


TENSORS: list[Row] = [
    *each("logits", "logits", other_tensors(r"\(S, T, V\)")),
    *each("linear", "hidden", other_tensors(r"\(S, T, D\)")),
    *each("linear", "weight", other_tensors(r"\(V, D=6\)")),
    *each("all", "labels", other_tensors(r"\(S, T\)")),
    *each("referenced", "ref_logps", other_tensors(r"\(S,\)")),
    *each("bco", "desirable", other_tensors(r"\(S,\)")),
    *each(
        "logits",
        "logits",
        [
            (lambda z: z[0], ValueError, r"\(S, T, V\).*got a float32 tensor of shape \(5, 11\)"),
            (lambda z: z[None], ValueError, r"\(S, T, V\).*got a float32 tensor of shape \(1, 4, 5, 11\)"),
            (lambda z: z.sum(), ValueError, r"\(S, T, V\).*got a float32 tensor of shape \(\)"),
            (lambda z: z > 0, TypeError, "got a bool tensor"),
            (lambda z: z.to(torch.float8_e4m3fn), TypeError, "got a float8_e4m3fn tensor"),
        ],
    ),
    *each(
        "linear",
        "hidden",
        [
            (lambda h: h[0], ValueError, r"\(S, T, D\).*got a float32 tensor of shape \(5, 6\)"),
            (lambda h: h[..., :0], ValueError, r"D >= 1.*got a float32 tensor of shape \(4, 5, 0\)"),
            (lambda h: h.to(torch.int32), TypeError, "got a int32 tensor"),
        ],
    ),
    ("linear", {"hidden": lambda h: h[..., 1:]}, ValueError, r"weight must be \(V, D=5\).*got .* of shape \(11, 6\)"),
    ("linear", {"hidden": lambda h: h.double()}, TypeError, "weight must be a float64 tensor.*got a float32"),
    *each(
        "linear",
        "weight",
        [
            (lambda w: w.t(), ValueError, r"\(V, D=6\).*got a float32 tensor of shape \(6, 11\)"),
            (lambda w: w[:0], ValueError, r"V >= 1.*got a float32 tensor of shape \(0, 6\)"),
            (lambda w: w[0], ValueError, r"got a float32 tensor of shape \(6,\)"),
            (lambda w: w[None], ValueError, r"got a float32 tensor of shape \(1, 11, 6\)"),
            (lambda w: w.bfloat16(), TypeError, "float32 tensor.*got a bfloat16 tensor"),
            (lambda w: w.to(torch.int8), TypeError, "float32 tensor.*got a int8 tensor"),
        ],
    ),
    *each(
        "linear",
        "bias",
        [
            ([0.0] * 11, TypeError, r"tensor \(V,\) or None; got \[0.0"),
            (0.0, TypeError, r"tensor \(V,\) or None; got 0.0"),
            (True, TypeError, r"tensor \(V,\) or None; got True"),
            (np.zeros(11), TypeError, r"tensor \(V,\) or None; got array"),
            (torch.zeros(10), ValueError, r"\(V,\) = \(11,\); got a float32 tensor of shape \(10,\)"),
            (torch.zeros(11, 1), ValueError, r"\(V,\) = \(11,\); got a float32 tensor of shape \(11, 1\)"),
            (torch.zeros(()), ValueError, r"\(V,\) = \(11,\); got a float32 tensor of shape \(\)"),
            (torch.zeros(11).half(), TypeError, r"float32 tensor \(V,\); got a float16 tensor"),
            (torch.zeros(11, dtype=torch.int64), TypeError, r"float32 tensor \(V,\); got a int64 tensor"),
            (torch.zeros(11, device="meta"), ValueError, "got a float32 tensor .* on meta"),
            (torch.zeros(11).to_sparse(), TypeError, "dense; got layout"),
        ],
    ),
    *each(
        "all",
        "labels",
        [
            (lambda y: y.short(), TypeError, "int64 or int32 tensor.*got a int16 tensor"),
            (lambda y: y.half(), TypeError, "int64 or int32 tensor.*got a float16 tensor"),
            (lambda y: y.t(), ValueError, r"\(S, T\) = \(4, 5\); got .* \(5, 4\)"),
            (lambda y: y[0], ValueError, r"\(S, T\) = \(4, 5\); got .* \(5,\)"),
            (lambda y: y[..., None], ValueError, r"\(S, T\) = \(4, 5\); got .* \(4, 5, 1\)"),
            (lambda y: y[:3], ValueError, r"\(S, T\) = \(4, 5\); got .* \(3, 5\)"),
            (lambda y: y.new_zeros(4, 6), ValueError, r"\(S, T\) = \(4, 5\); got .* \(4, 6\)"),
            (lambda y: y[:0], ValueError, r"\(S, T\) = \(4, 5\); got .* \(0, 5\)"),
        ],
    ),
    *each(
        "referenced",
        "ref_logps",
        [
            (lambda r: torch.cat((r, r[:1])), ValueError, r"\(S,\) = \(4,\); got .* \(5,\)"),
            (lambda r: r[None], ValueError, r"\(S,\) = \(4,\); got .* \(1, 4\)"),
            (lambda r: r[0], ValueError, r"\(S,\) = \(4,\); got .* \(\)"),
            (lambda r: r[:0], ValueError, r"\(S,\) = \(4,\); got .* \(0,\)"),
            (lambda r: r > 0, TypeError, "got a bool tensor"),
        ],
    ),
    *each(
        "bco",
        "desirable",
        [
            (lambda d: d.int(), TypeError, r"bool tensor \(S,\); got a int32 tensor"),
            (lambda d: d.float(), TypeError, r"bool tensor \(S,\); got a float32 tensor"),
            (lambda d: d[:, None], ValueError, r"\(S,\) = \(4,\); got .* \(4, 1\)"),
            (lambda d: torch.cat((d, d)), ValueError, r"\(S,\) = \(4,\); got .* \(8,\)"),
            (lambda d: d[0], ValueError, r"\(S,\) = \(4,\); got .* \(\)"),
        ],
    ),
    *each(
        "bco",
        "sample_weight",
        [
            (1.0, TypeError, r"tensor \(S,\) or None; got 1.0"),
            (np.ones(4), TypeError, r"tensor \(S,\) or None; got array"),
            ((1, 1, 1, 1), TypeError, r"tensor \(S,\) or None; got \(1, 1, 1, 1\)"),
            (torch.ones(4, 1), ValueError, r"\(S,\) = \(4,\); got .* \(4, 1\)"),
            (torch.ones(5), ValueError, r"\(S,\) = \(4,\); got .* \(5,\)"),
            (torch.tensor(1.0), ValueError, r"\(S,\) = \(4,\); got .* \(\)"),
            (torch.ones(4, dtype=torch.bool), TypeError, "got a bool tensor"),
            (torch.ones(4, dtype=torch.complex64), TypeError, "got a complex64 tensor"),
            (torch.ones(4, device="meta"), ValueError, "got .* on meta"),
            (torch.ones(4).to_sparse(), TypeError, "dense; got layout"),
        ],
    ),
]

PACKED: list[Row] = [
    *each(
        "all",
        "cu_seqlens",
        [
            (lambda c: c.short(), TypeError, r"int32 or int64 tensor \(S\+1,\); got a int16 tensor"),
            (lambda c: c.double(), TypeError, r"int32 or int64 tensor \(S\+1,\); got a float64 tensor"),
            (lambda c: c > 0, TypeError, r"int32 or int64 tensor \(S\+1,\); got a bool tensor"),
            (lambda c: c.to(torch.uint64), TypeError, "got a uint64 tensor"),
            (lambda c: c[None], ValueError, r"\(S\+1,\).*got a int64 tensor of shape \(1, 5\)"),
            (lambda c: c[0], ValueError, r"\(S\+1,\).*got a int64 tensor of shape \(\)"),
            (lambda c: c[:0], ValueError, r"\(S\+1,\).*got a int64 tensor of shape \(0,\)"),
            (lambda c: c[:-1], ValueError, r"N_total = 14; got \[0, 4, 9, 11\] ending at 11"),
            (lambda c: c + 1, ValueError, r"start at 0.*; got \[1, 5, 10, 12, 15\] ending at 15"),
            (lambda c: -c, ValueError, r"N_total = 14; got \[0, -4, -9, -11, -14\] ending at -14"),
            (lambda c: c.flip(0), ValueError, r"start at 0.*; got \[14, 11, 9, 4, 0\] ending at 0"),
            (lambda c: c[[0, 2, 1, 3, 4]], ValueError, r"never fall.*; got \[0, 9, 4, 11, 14\] ending at 14"),
            (lambda c: c.diff(), ValueError, r"start at 0.*; got \[4, 5, 2, 3\] ending at 3"),
            (lambda c: c.to("meta"), ValueError, "holds values; got a int64 tensor"),
            (lambda c: c.to_sparse(), TypeError, "dense; got layout"),
        ],
    ),
    ("all", {"labels": lambda y: y[1:]}, ValueError, r"labels must be \(N_total,\) = \(14,\); got .* \(13,\)"),
    ("all", {"labels": lambda y: y[None]}, ValueError, r"labels must be \(N_total,\) = \(14,\); got .* \(1, 14\)"),
    ("logits", {"logits": lambda z: z[None]}, ValueError, r"logits must be \(N_total, V\).*got .* \(1, 14, 11\)"),
    ("linear", {"hidden": lambda h: h[None]}, ValueError, r"hidden must be \(N_total, D\).*got .* \(1, 14, 6\)"),
    ("logits", {"cu_seqlens": None}, ValueError, r"logits must be \(S, T, V\).*got .* \(14, 11\)"),
    ("linear", {"cu_seqlens": None}, ValueError, r"hidden must be \(S, T, D\).*got .* \(14, 6\)"),
    ("pairs", {"cu_seqlens": lambda c: c[[0, 1, 2, 4]]}, ValueError, "cu_seqlens must hold S = 2B .*; got S = 3"),
    ("referenced", {"ref_logps": lambda r: r[:3]}, ValueError, r"ref_logps must be \(S,\) = \(4,\); got .* \(3,\)"),
    ("bco", {"desirable": lambda d: d[:3]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(3,\)"),
]

# Two arguments in each other's place.
SWAPPED: list[tuple[str, tuple[str, str], type[Exception], str]] = [
    ("logits", ("logits", "labels"), TypeError, "logits must be a float32 .*; got a int64 tensor"),
    ("linear", ("hidden", "weight"), ValueError, r"hidden must be \(S, T, D\).*; got a float32 tensor .* \(11, 6\)"),
    ("linear", ("weight", "labels"), TypeError, r"labels must be a int64 .*; got a float32 tensor .* \(11, 6\)"),
    ("linear", ("hidden", "labels"), TypeError, "hidden must be a float32 .*; got a int64 tensor"),
    ("bco", ("desirable", "ref_logps"), TypeError, "desirable must be a bool .*; got a float32 tensor"),
    ("bco", ("labels", "desirable"), TypeError, "labels must be a int64 .*; got a bool tensor"),
    ("referenced", ("labels", "ref_logps"), TypeError, "labels must be a int64 .*; got a float32 tensor"),
]

# Entries, which are looked at under ``checks`` alone.
ENTRIES: list[Row] = [
    (
        "all",
        {"labels": lambda y: y.index_fill(1, y.new_tensor([2]), 11)},
        ValueError,
        r"labels.*V=11\); got 11 at \[0, 2",
    ),
    ("all", {"labels": lambda y: y.index_fill(1, y.new_tensor([2]), -1)}, ValueError, r"labels.*; got -1 at \[0, 2\]"),
    *each(
        "referenced",
        "ref_logps",
        [
            (lambda r: r / 0, ValueError, r"finite; got -inf at \[0\]"),
            (torch.tensor([0, 0, NAN, 0]), ValueError, r"finite; got nan at \[2\]"),
        ],
    ),
    *each(
        "bco",
        "sample_weight",
        [
            (torch.tensor([1, 1, -1.0, 1]), ValueError, r">= 0; got -1.0 at \[2\]"),
            (torch.tensor([1, 1, 1, NAN]), ValueError, r">= 0; got nan at \[3\]"),
            (torch.tensor([1, 1 / torch.zeros(()), 1, 1]), ValueError, r">= 0; got inf at \[1\]"),
        ],
    ),
    ("bco", {"delta": torch.tensor(NAN)}, ValueError, "delta must be finite; got nan"),
    (
        "logits",
        {"logits": lambda z: z * NAN},
        ValueError,
        "log-prob of each (token|sequence) must be finite; got nan",
    ),
    (
        "linear",
        {"hidden": lambda h: h * NAN},
        ValueError,
        "log-prob of each (token|sequence) must be finite; got nan",
    ),
]
ODD: list[Row] = [
    (name, dict.fromkeys(set(valid(name)) - {"weight"}, lambda x: x[:3]), ValueError, "S = 2B .*; got S = 3")
    for name in names("pairs")
]


@pytest.mark.parametrize(("group", "changes", "error", "match"), TENSORS + ODD)
def test_padded(group: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaints(group, changes, error, match) == []


@pytest.mark.parametrize(("group", "changes", "error", "match"), PACKED)
def test_packed(group: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaints(group, changes, error, match, packed=True) == []


@pytest.mark.parametrize(("group", "pair", "error", "match"), SWAPPED)
def test_swapped(group: str, pair: tuple[str, str], error: type[Exception], match: str) -> None:
    for name in names(group):
        arguments = valid(name)
        first, second = (arguments[key] for key in pair)
        swapped = {**arguments, pair[0]: second, pair[1]: first}
        assert complaint(getattr(fp, name), swapped, error, match) == ""


@pytest.mark.parametrize(("group", "changes", "error", "match"), ENTRIES)
def test_entries(group: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with fp.checks():
        assert complaints(group, changes, error, match) == []


def test_checks_take_no_arguments() -> None:
    with pytest.raises(TypeError, match=r"checks\(\) takes 0 positional arguments but 1 was given"):
        fp.checks(True)  # type: ignore[call-arg]
