"""Malformed keywords: each message names the argument, what was expected and what came."""

import ast
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import GROUPS, Row, changed, complaint, complaints, each, names, valid

import fused_pref as fp

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
META = torch.tensor(1.0, device="meta")

NOT_NUMBERS: list[Any] = [
    ("0.5", TypeError, "number.*; got '0.5'"),
    (True, TypeError, "number.*; got True"),
    (np.True_, TypeError, "number.*; got np.True_"),
    (1j, TypeError, "number.*; got 1j"),
    ([0.5], TypeError, r"number.*; got \[0.5\]"),
    (np.array(0.5), TypeError, r"number.*; got array\(0.5\)"),
    (torch.tensor(0.5), TypeError, r"number.*; got a float32 tensor of shape \(\) on cpu"),
    (Decimal("0.5"), TypeError, r"number.*; got Decimal\('0.5'\)"),
    (HUGE, ValueError, "number.*; got 1000"),
    (Fraction(HUGE, 3), ValueError, r"number.*; got Fraction\(1000"),
    (-INF, ValueError, "number.*; got -inf"),
    (np.float32(NAN), ValueError, r"number.*; got np.float32\(nan\)"),
]
NOT_FLAGS: list[Any] = [
    (0, TypeError, "True or False; got 0"),
    ("True", TypeError, "True or False; got 'True'"),
    (np.True_, TypeError, "True or False; got np.True_"),
    (torch.tensor(True), TypeError, "True or False; got a bool tensor"),
]
NOT_INTEGERS: list[Any] = [
    ("3", TypeError, "an integer.*; got '3'"),
    (3.0, TypeError, "an integer.*; got 3.0"),
    (True, TypeError, "an integer.*; got True"),
    (np.float64(3), TypeError, r"an integer.*; got np.float64\(3.0\)"),
    (torch.tensor(3), TypeError, "an integer.*; got a int64 tensor"),
    (2**63, ValueError, "an integer of 64 bits.*; got 9223372036854775808"),
    (-(2**70), ValueError, "an integer.*; got -1180591620717411303424"),
]
NOT_COUNTS: list[Any] = [
    ("4", TypeError, "0-d tensor.*; got '4'"),
    (True, TypeError, "0-d tensor.*; got True"),
    (1j, TypeError, "0-d tensor.*; got 1j"),
    ([4], TypeError, r"0-d tensor.*; got \[4\]"),
    (np.array([4.0]), TypeError, r"0-d tensor.*; got array\(\[4.\]\)"),
    (-2, ValueError, "0-d tensor.*; got -2"),
    (NAN, ValueError, "0-d tensor.*; got nan"),
    (HUGE, ValueError, "0-d tensor.*; got 1000"),
    (np.float32(-1), ValueError, r"0-d tensor.*; got np.float32\(-1.0\)"),
    (torch.ones(1), ValueError, r"0-d tensor.*; got a float32 tensor of shape \(1,\)"),
    (torch.ones(2, 2), ValueError, r"0-d tensor.*; got a float32 tensor of shape \(2, 2\)"),
    (torch.tensor(1j), ValueError, "0-d tensor.*; got a complex64 tensor"),
    (torch.tensor(INF), ValueError, "0-d tensor.*; got inf"),
    (torch.tensor(-3), ValueError, "0-d tensor.*; got -3"),
    (META, ValueError, r"a device that holds values; got a float32 tensor of shape \(\) on meta"),
    (torch.tensor(1.0).to_sparse(), TypeError, "dense; got layout torch.sparse_coo"),
]


SHARED: list[Row] = [
    *each("all", "ignore_index", [*NOT_INTEGERS, (None, TypeError, "an integer; got None")]),
    ("all", {"labels": lambda y: y.int(), "ignore_index": 2**31}, ValueError, "ignore_index.*32 bits.*got 2147483648"),
    *each("all", "shift", [*NOT_FLAGS, (None, TypeError, "True or False; got None")]),
    *each("all", "softcap", [*NOT_NUMBERS, (np.float64(0), ValueError, "> 0; got np.float64")]),
    *each("all", "softcap", [(cap, ValueError, "ratios that float32 can hold; got one of") for cap in (1e39, 1e-39)]),
    *each("all", "logit_scale", [(1e-46, ValueError, "ratios that float32 can hold; got one of 1e-46")]),
    *each("all", "temperature", [(1e39, ValueError, "ratios that float32 can hold; got one of 1e-39")]),
    *each("all", "logit_scale", [*NOT_NUMBERS, (None, TypeError, "0; got None"), (-0.0, ValueError, "0; got -0.0")]),
    *each("all", "temperature", [*NOT_NUMBERS, (Fraction(-1, 2), ValueError, r"> 0; got Fraction\(-1, 2\)")]),
    *each(
        "all",
        "backend",
        [
            ("Torch", ValueError, "one of .*; got 'Torch'"),
            ("", ValueError, "one of .*; got ''"),
            (b"torch", TypeError, "one of .*; got b'torch'"),
            (True, TypeError, "one of .*; got True"),
        ],
    ),
    *each(
        "all",
        "logits_mean",
        [
            ("All", ValueError, "one of .*; got 'All'"),
            ("none", ValueError, "one of .*; got 'none'"),
            (0, TypeError, "one of .*; got 0"),
            (("all",), TypeError, r"one of .*; got \('all',\)"),
        ],
    ),
    *each("all", "cp_group", [(g, TypeError, "ProcessGroup.*; got") for g in ("world", 0, True, [0, 1])]),
    *each(
        "all",
        "cu_seqlens",
        [
            (False, TypeError, "a tensor.*; got False"),
            (5, TypeError, "a tensor.*; got 5"),
            ([0, 5], TypeError, r"a tensor.*; got \[0, 5\]"),
            (np.array([0, 5]), TypeError, r"a tensor.*; got array\(\[0, 5\]\)"),
            ("0,5", TypeError, "a tensor.*; got '0,5'"),
        ],
    ),
    *each("logits", "inplace_backward", NOT_FLAGS),
    *each("sequence", "average", NOT_FLAGS),
    *each("linear", "memory_budget", NOT_INTEGERS),
    *each("linear", "memory_budget", [(0, ValueError, ">= 1.*got 0"), (1, ValueError, r"at least \d+ bytes.*got 1\b")]),
    *each("linear", "max_valid_tokens", NOT_INTEGERS),
    *each("linear", "max_valid_tokens", [(-1, ValueError, ">= 0.*got -1"), (1, ValueError, "at least N = .*got 1")]),
    *each("linear", "skip_mass", [*NOT_NUMBERS, (2, ValueError, r"\[0, 1\); got 2")]),
    *each("linear", "tp_group", [(g, TypeError, "ProcessGroup.*; got") for g in ("tp", 0, True, [0, 1])]),
    *each("linear", "tp_partial", [*NOT_FLAGS, (None, TypeError, "True or False; got None")]),
]

OBJECTIVES: list[Row] = [
    *each("pairs", "beta", [*NOT_NUMBERS, (np.float32(0), ValueError, "> 0; got"), (None, TypeError, "got None")]),
    *each("bco", "beta", [*NOT_NUMBERS, (-1, ValueError, "> 0; got -1"), (None, TypeError, "got None")]),
    *each("pairs", "loss_type", [("Sigmoid", ValueError, "got 'Sigmoid'"), (b"ipo", TypeError, "got b'ipo'")]),
    *each("pairs", "loss_type", [(["ipo"], TypeError, r"got \['ipo'\]"), ("", ValueError, "got ''")]),
    *each("dpo", "loss_type", [(x, ValueError, rf"'ipo'\); got '{x}'") for x in ("simpo", "alphapo", "cpo")]),
    *each("pairs", "label_smoothing", [*NOT_NUMBERS, (2, ValueError, "got 2"), (None, TypeError, "got None")]),
    *each("pairs", "pair_normalizer", [*NOT_COUNTS, (torch.tensor(0), ValueError, "> 0; got 0")]),
    *each("pairs", "token_normalizer", NOT_COUNTS),
    *each("cpo", "cpo_alpha", [*NOT_NUMBERS, (-1e-9, ValueError, ">= 0; got -1e-09"), (None, TypeError, "got None")]),
    *each("cpo", "simpo_gamma", [*NOT_NUMBERS, (None, TypeError, "got None")]),
    *each("cpo", "alpha", NOT_NUMBERS),
    *each("cpo", "nll_reduction", [("Token", ValueError, "got 'Token'"), (None, ValueError, "got None")]),
    *each("cpo", "nll_reduction", [(3, TypeError, "got 3"), ("class_mean", ValueError, "got 'class_mean'")]),
    *each("bco", "delta", [row for row in NOT_NUMBERS if not isinstance(row[0], torch.Tensor)]),
    *each(
        "bco",
        "delta",
        [
            (None, TypeError, "RewardShift.*got None"),
            (fp.RewardShift, TypeError, "RewardShift.*got <class"),
            (torch.zeros(1), ValueError, r"0-d floating tensor; got a float32 tensor of shape \(1,\)"),
            (torch.tensor(1j), ValueError, "0-d floating tensor; got a complex64 tensor"),
            (torch.tensor(True), ValueError, "0-d floating tensor; got a bool tensor"),
            (META, ValueError, "holds values; got"),
            (torch.tensor(0.5).to_sparse(), TypeError, "dense; got layout"),
            (fp.RewardShift().to("meta"), ValueError, "a RewardShift on cpu like the other tensors; got one on meta"),
        ],
    ),
    *each("bco", "reduction", [("Mean", ValueError, "got 'Mean'"), (None, ValueError, "got None")]),
    *each("bco", "reduction", [("none", ValueError, "got 'none'"), (1, TypeError, "got 1")]),
    *each("bco", "sequence_normalizer", [*NOT_COUNTS, (torch.tensor(0.0), ValueError, "> 0; got 0.0")]),
    *[
        ("bco", {"reduction": "class_mean", "class_normalizer": (1, value)}, error, f"class_normalizer.*{text}")
        for value, error, text in NOT_COUNTS
    ],
    *[
        (
            "bco",
            {"reduction": "class_mean", "class_normalizer": value},
            TypeError,
            r"class_normalizer.*a pair \(n\+, n-",
        )
        for value in (3, (1,), (1, 2, 3), "ab", {1: 2, 3: 4}, torch.ones(2), np.ones(2), (None, 1))
    ],
    ("bco", {"reduction": "class_mean", "sequence_normalizer": 4}, ValueError, "sequence_normalizer.*got reduction='c"),
    ("bco", {"class_normalizer": (1, 1)}, ValueError, "class_normalizer needs.*got reduction='mean'"),
]

UNKNOWN: list[tuple[str, str, Any]] = [
    ("all", "betta", 0.1),
    ("all", "Shift", True),
    ("all", "ignore_idx", -100),
    ("all", "delta_kind", "ema"),
    ("logits", "bias", None),
    ("logits", "memory_budget", None),
    ("logits", "max_valid_tokens", 3),
    ("logits", "skip_mass", 0.1),
    ("logits", "tp_group", None),
    ("logits", "hidden", None),
    ("linear", "inplace_backward", False),
    ("linear", "logits", None),
    ("logps", "beta", 0.1),
    ("logps", "ref_logps", None),
    ("token", "average", True),
    ("pairs", "delta", 0.0),
    ("pairs", "desirable", None),
    ("pairs", "sample_weight", None),
    ("pairs", "reduction", "mean"),
    ("cpo", "ref_logps", None),
    ("dpo", "cpo_alpha", 0.0),
    ("dpo", "simpo_gamma", 0.5),
    ("dpo", "nll_reduction", "token"),
    ("bco", "label_smoothing", 0.0),
    ("bco", "loss_type", "sigmoid"),
    ("bco", "pair_normalizer", None),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", GROUPS["all"])
def test_the_unchanged_call_is_valid(name: str, packed: bool) -> None:
    output = getattr(fp, name)(**valid(name, packed=packed))
    assert getattr(output, "loss", output).isfinite().all()


@pytest.mark.parametrize(("group", "changes", "error", "match"), SHARED + OBJECTIVES)
def test_keywords(group: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaints(group, changes, error, match) == []


@pytest.mark.parametrize(("group", "keyword", "value"), UNKNOWN)
def test_unknown_keywords(group: str, keyword: str, value: Any) -> None:
    """Of the functions and of their references."""
    for name, home in [(name, home) for name in names(group) for home in (fp, fp.reference)]:
        match = rf"{name}\(\) got an unexpected keyword argument '{keyword}'"
        assert complaint(getattr(home, name), {**valid(name), keyword: value}, TypeError, match) == ""


@pytest.mark.parametrize("name", GROUPS["all"])
def test_positional_arguments(name: str) -> None:
    """One that is missing, one too many, and one that is given twice."""
    function, arguments = getattr(fp, name), valid(name)
    for missing in arguments:
        rest = {key: value for key, value in arguments.items() if key != missing}
        assert complaint(function, rest, TypeError, rf"{name}\(\) missing 1 required .*'{missing}'") == ""
    number = len(arguments)
    match = rf"{name}\(\) takes {number} positional arguments but {number + 1} were given"
    with pytest.raises(TypeError, match=match):
        function(*arguments.values(), -100)
    with pytest.raises(TypeError, match=rf"{name}\(\) got multiple values for argument 'labels'"):
        function(*arguments.values(), labels=arguments["labels"])


NUMBERS: list[tuple[str, dict[str, Any]]] = [
    ("all", {"ignore_index": np.int64(-100), "softcap": np.float32(30), "temperature": np.float64(0.5)}),
    ("all", {"logit_scale": Fraction(1, 2), "logits_mean": None}),
    ("linear", {"memory_budget": np.int64(10**7), "max_valid_tokens": np.uint8(20), "skip_mass": np.float32(0.1)}),
    ("pairs", {"beta": np.float16(0.5), "pair_normalizer": np.int32(3), "token_normalizer": torch.tensor(5)}),
    ("bco", {"beta": 1, "delta": np.float32(0.5), "sequence_normalizer": np.float64(3)}),
    ("bco", {"reduction": "class_mean", "class_normalizer": [np.int64(2), torch.tensor(2.0)]}),
]


@pytest.mark.parametrize(("group", "changes"), NUMBERS)
def test_numbers_of_other_kinds_are_numbers(group: str, changes: dict[str, Any]) -> None:
    for name in names(group):
        output = getattr(fp, name)(**changed(valid(name), changes))
        assert getattr(output, "loss", output).isfinite().all()


def refusals() -> int:
    """The tables without ``assert``: how many rows there are.

    Raises:
        SystemExit: a row is refused in another way, or accepted.
    """
    rows = SHARED[::9] + OBJECTIVES[::9]
    found = [text for row in rows for text in complaints(*row)]
    if found:
        raise SystemExit("\n".join(found))
    return len(rows)


@pytest.mark.slow
def test_optimised_python_refuses_the_same() -> None:
    program = "import test_malformed; print(__debug__, test_malformed.refusals())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-O", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == f"False {refusals()}\n", done.stdout + done.stderr
    assert refusals() >= 24


def test_the_library_validates_without_assert() -> None:
    for path in Path(fp.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)], path
