"""What ``check_parity`` refuses: every argument, what a function returns, and one that changes its inputs."""

import inspect
from typing import Any

import pytest
import torch
from malformed import complaint
from torch import Tensor

import fused_pref as fp
from fused_pref.testing import check_parity


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fp.reference.linear_sequence_logps(hidden, weight, labels).mean()


def vector(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return hidden.sum(-1)


def constant(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return hidden.detach().sum()


FUNCTION = r"must be a function of \(hidden, weight, labels\); got"
ROWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"loss": 3}, TypeError, f"loss {FUNCTION} 3"),
    ({"reference": None}, TypeError, f"reference {FUNCTION} None"),
    ({"loss": vector}, TypeError, r"loss must be a function whose result is a 0-d .*; got .* \(2, 3\)"),
    ({"reference": vector}, TypeError, r"reference must be a function whose result .*; got .* \(2, 3\)"),
    ({"loss": constant}, TypeError, "loss must be a differentiable function; got a result that requires no"),
    ({"logits": "random"}, TypeError, "logits must be a sequence.*; got 'random'"),
    ({"logits": ()}, ValueError, r"logits must be at least one of .*; got \(\)"),
    ({"logits": ("Random",)}, ValueError, "logits must be of .*; got 'Random'"),
    ({"dtypes": ["float32"]}, ValueError, "dtypes must be of .*; got 'float32'"),
    ({"dtypes": []}, ValueError, r"dtypes must be at least one of .*; got \[\]"),
    ({"shape": 4}, ValueError, r"shape must be \(S, T, D, V\).*; got 4"),
    ({"shape": (2, 3, 4)}, ValueError, r"shape must be \(S, T, D, V\).*; got \(2, 3, 4\)"),
    ({"shape": "2x3x4x7"}, ValueError, r"shape must be \(S, T, D, V\).*; got '2x3x4x7'"),
    ({"shape": (3, 4, 5, 6)}, ValueError, r"shape must be .*, each >= 1 and S even; got \(3, 4, 5, 6\)"),
    ({"shape": (2, 4, 0, 6)}, ValueError, r"shape must be .*, each >= 1 and S even; got \(2, 4, 0, 6\)"),
    ({"shape": (2.0, 3, 4, 7)}, TypeError, "shape must be an integer; got 2.0"),
    ({"device": "nowhere"}, ValueError, "device must be a device that is available here; got 'nowhere'"),
    ({"device": "meta"}, ValueError, "device must be a device that holds values; got 'meta'"),
    ({"device": None}, TypeError, "device must be a device that is available here; got None"),
    ({"seeds": 0}, ValueError, "seeds must be an integer >= 1; got 0"),
    ({"peers": [exact]}, TypeError, r"peers must be a mapping .*; got \[<function"),
    ({"peers": {"loss": exact}}, ValueError, "peers must have other names than 'loss'"),
    ({"peers": {"reference": exact}}, ValueError, "peers must have other names than 'reference'"),
    ({"peers": {"other": 3}}, TypeError, rf"peers\['other'\] {FUNCTION} 3"),
    ({"raise_exception": "no"}, TypeError, "raise_exception must be True or False; got 'no'"),
]
ARGUMENTS: dict[str, Any] = {
    "loss": exact,
    "reference": exact,
    "shape": (2, 3, 4, 7),
    "logits": ("random",),
    "dtypes": (torch.float32,),
    "seeds": 1,
}


@pytest.mark.parametrize(("changes", "error", "match"), ROWS)
def test_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaint(check_parity, {**ARGUMENTS, **changes}, error, match) == ""


def test_every_argument_is_looked_at() -> None:
    check_parity(**ARGUMENTS)
    assert {name for changes, _, _ in ROWS for name in changes} == set(inspect.signature(check_parity).parameters)
