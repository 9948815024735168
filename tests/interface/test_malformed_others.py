"""Malformed use of the reward shift, the density ratio, ``explain`` and ``check_parity``."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from malformed import changed, complaint
from torch import Tensor

import fused_pref as fp
from fused_pref.testing import check_parity

NAN, INF = float("nan"), float("inf")
REWARDS = {"rewards": torch.zeros(4), "desirable": torch.tensor([True, False, True, False])}
EMBEDDINGS = {"embeddings": torch.randn(4, 3), "desirable": torch.tensor([True, False, True, False])}
Rows = list[tuple[dict[str, Any], type[Exception], str]]
SHIFTS: Rows = [
    ({"kind": "EMA"}, ValueError, "kind must be one of .*got 'EMA'"),
    ({"kind": 0}, TypeError, "kind must be one of .*got 0"),
    ({"kind": fp.RewardShift}, TypeError, "kind must be one of .*got <class"),
    ({"decay": "0.9"}, TypeError, r"decay must be a number in \[0, 1\); got '0.9'"),
    ({"decay": True}, TypeError, r"decay must be a number in \[0, 1\); got True"),
    ({"decay": Decimal("0.9")}, TypeError, "decay must be a number.*got Decimal"),
    ({"decay": np.float32(1)}, ValueError, "decay must be a number.*got np.float32"),
    ({"value": None}, TypeError, "value must be a finite number; got None"),
    ({"value": 10**400}, ValueError, "value must be a finite number; got 1000"),
    ({"value": torch.tensor(0.5)}, TypeError, "value must be a finite number; got a float32 tensor"),
    ({"update": None}, ValueError, "update must be one of .*got None"),
    ({"update": "Step"}, ValueError, "update must be one of .*got 'Step'"),
    ({"update": True}, TypeError, "update must be one of .*got True"),
    ({"process_group": 0}, TypeError, "process_group must be .*got 0"),
    ({"momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
]
REWARD_ROWS: Rows = [
    ({"rewards": [0.0] * 4}, TypeError, r"rewards must be .* tensor \(S,\); got \[0.0"),
    ({"rewards": np.zeros(4)}, TypeError, r"rewards must be .* tensor \(S,\); got array"),
    ({"rewards": torch.zeros(4, 1)}, ValueError, r"rewards must be \(S,\); got .* \(4, 1\)"),
    ({"rewards": torch.tensor(0.0)}, ValueError, r"rewards must be \(S,\); got .* \(\)"),
    ({"rewards": torch.zeros(4, dtype=torch.int64)}, TypeError, "rewards must be .*; got a int64 tensor"),
    ({"rewards": torch.zeros(4, device="meta")}, ValueError, "rewards must be on a device that holds values"),
    ({"desirable": [True] * 4}, TypeError, r"desirable must be a bool tensor \(S,\); got \[True"),
    ({"desirable": torch.ones(4)}, TypeError, r"desirable must be a bool tensor \(S,\); got a float32"),
    ({"desirable": lambda d: d[:3]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(3,\)"),
    ({"desirable": lambda d: d[:, None]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(4, 1\)"),
    ({"desirable": None}, TypeError, "desirable must be a bool tensor .*; got None"),
    ({"rewards": REWARDS["desirable"], "desirable": REWARDS["rewards"]}, TypeError, "rewards must .*got a bool tensor"),
]
SHIFT_STATES: Rows = [
    ({"mean": torch.zeros(3)}, ValueError, r"state_dict\['mean'\] must be \(2,\); got .* \(3,\)"),
    ({"mean": torch.tensor([0.0, NAN])}, ValueError, r"state_dict\['mean'\] must be finite; got \[0.0, nan\]"),
    ({"mean": [0.0, 0.0]}, TypeError, r"state_dict\['mean'\] must be .* tensor \(2,\); got \[0.0, 0.0\]"),
    ({"mean": torch.zeros(2, dtype=torch.complex64)}, TypeError, r"state_dict\['mean'\] must .*got a complex64 tensor"),
    ({"count": torch.tensor([1, -1])}, ValueError, r"state_dict\['count'\] must be finite and >= 0; got \[1, -1\]"),
    ({"count": torch.ones(2)}, TypeError, r"state_dict\['count'\] must be a int64 .*got a float32 tensor"),
    ({"pending_sum": torch.tensor([INF, 0])}, ValueError, r"state_dict\['pending_sum'\] must be finite; got \[inf"),
    ({"pending_sum": None}, TypeError, r"state_dict\['pending_sum'\] must be .*; got None"),
    ({"pending_count": torch.ones((), dtype=torch.int64)}, ValueError, r"state_dict\['pending_count'\] must .* \(\)"),
]
RATIOS: Rows = [
    ({"min_ratio": "0.5"}, TypeError, "min_ratio must be a finite number > 0; got '0.5'"),
    ({"min_ratio": -1}, ValueError, "min_ratio must be a finite number > 0; got -1"),
    ({"min_ratio": 20}, ValueError, r"max_ratio must be >= min_ratio = 20.0; got 10.0"),
    ({"max_ratio": INF}, ValueError, "max_ratio must be a finite number > 0; got inf"),
    ({"max_ratio": True}, TypeError, "max_ratio must be a finite number > 0; got True"),
    ({"sample_size": 2.0}, TypeError, "sample_size must be an integer; got 2.0"),
    ({"sample_size": True}, TypeError, "sample_size must be an integer; got True"),
    ({"sample_size": 0}, ValueError, "sample_size must be an integer >= 2, or None; got 0"),
    ({"seed": 1.5}, TypeError, "seed must be an integer; got 1.5"),
    ({"seed": None}, TypeError, "seed must be an integer; got None"),
    ({"seed": 2**64}, ValueError, "seed must be an integer of 64 bits.*; got 18446744073709551616"),
    ({"seed": -(2**63) - 1}, ValueError, "seed must be an integer of 64 bits.*; got -9223372036854775809"),
    ({"ratio": 1}, TypeError, "unexpected keyword argument 'ratio'"),
]
FITS: Rows = [
    ({"embeddings": [[1.0, 2.0], [3.0], [], []]}, TypeError, r"embeddings must be .*; got \[\["),
    ({"embeddings": np.array(["a", "b", "c", "d"])}, TypeError, r"embeddings must be .*; got array"),
    ({"embeddings": "a sentence"}, TypeError, "embeddings must be .*; got 'a sentence'"),
    ({"embeddings": lambda e: e.long()}, TypeError, "embeddings must be .*; got a int64 tensor"),
    ({"embeddings": lambda e: e[:, :0]}, ValueError, r"embeddings must be \(M, E\) with E >= 1; got .* \(4, 0\)"),
    ({"embeddings": lambda e: e[:0]}, ValueError, r"desirable must be \(M,\) = \(0,\); got .* \(4,\)"),
    ({"embeddings": lambda e: e[None]}, ValueError, r"embeddings must be \(M, E\).*; got .* \(1, 4, 3\)"),
    ({"embeddings": lambda e: e.to("meta")}, ValueError, "embeddings must be on a device that holds values"),
    ({"desirable": lambda d: d.long()}, TypeError, r"desirable must be a bool tensor \(M,\); got a int64 tensor"),
    ({"desirable": lambda d: d[:3]}, ValueError, r"desirable must be \(M,\) = \(4,\); got .* \(3,\)"),
    ({"desirable": lambda d: d & False}, ValueError, "desirable must hold both classes.*; got 0 of 4"),
    ({"desirable": None}, TypeError, "desirable must be a bool tensor .*; got None"),
]
WEIGHINGS: Rows = [
    ({"embeddings": lambda e: e[0]}, ValueError, r"embeddings must be \(S, E=3\); got .* \(3,\)"),
    ({"embeddings": lambda e: e[:, :2]}, ValueError, r"embeddings must be \(S, E=3\); got .* \(4, 2\)"),
    ({"embeddings": lambda e: e > 0}, TypeError, "embeddings must be .*; got a bool tensor"),
    ({"embeddings": None}, TypeError, "embeddings must be .*; got None"),
    ({"desirable": lambda d: d.float()}, TypeError, r"desirable must be a bool tensor \(S,\); got a float32 tensor"),
    ({"desirable": lambda d: d[:, None]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(4, 1\)"),
    ({"desirable": ["yes"] * 4}, TypeError, r"desirable must be a bool tensor \(S,\); got \['yes"),
]
RATIO_STATES: Rows = [
    ({"coefficients": torch.ones(1, 3)}, ValueError, r"state_dict\['coefficients'\] must be \(E,\).*got .* \(1, 3\)"),
    ({"coefficients": [1.0] * 3}, TypeError, r"state_dict\['coefficients'\] must be .*; got \[1.0, 1.0, 1.0\]"),
    (
        {"coefficients": torch.tensor([1, NAN])},
        ValueError,
        r"state_dict\['coefficients'\] must be finite; got .1.0, n",
    ),
    ({"intercept": torch.zeros(1)}, ValueError, r"state_dict\['intercept'\] must be \(\); got .* \(1,\)"),
    ({"intercept": torch.tensor(INF)}, ValueError, r"state_dict\['intercept'\] must be finite; got inf"),
    ({"intercept": torch.tensor(1)}, TypeError, r"state_dict\['intercept'\] must be .*; got a int64 tensor"),
]
EXPLAINED: Rows = [
    ({"model": "Phi-4"}, ValueError, "model must be one of .*got 'Phi-4'"),
    ({"model": 4}, TypeError, "model must be one of .*got 4"),
    ({"hidden": 0}, ValueError, "hidden must be an integer >= 1; got 0"),
    ({"hidden": "4096"}, TypeError, "hidden must be an integer; got '4096'"),
    ({"vocab": False}, TypeError, "vocab must be an integer; got False"),
    ({"vocab": -1}, ValueError, "vocab must be an integer >= 1; got -1"),
    ({"tokens": 8192.0}, TypeError, "tokens must be an integer; got 8192.0"),
    ({"tokens": 2**63}, ValueError, "tokens must be an integer of 64 bits.*; got 9223372036854775808"),
    ({"sequences": 0}, ValueError, "sequences must be an integer >= 1; got 0"),
    ({"sequences": None}, TypeError, "sequences must be an integer; got None"),
    ({"positions": True}, TypeError, "positions must be an integer; got True"),
    ({"objective": "CPO"}, ValueError, "objective must be one of .*got 'CPO'"),
    ({"objective": None}, ValueError, "objective must be one of .*got None"),
    ({"dtype": None}, ValueError, "dtype must be one of .*got None"),
    ({"dtype": np.float32}, ValueError, "dtype must be one of .*got <class 'numpy.float32'>"),
    ({"device": "cuda:0"}, ValueError, "device must be one of .*got 'cuda:0'"),
    ({"device": torch.device("cpu")}, TypeError, "device must be one of .*got device"),
    ({"gradients": None}, TypeError, "gradients must be a sequence.*got None"),
    ({"gradients": "weight"}, TypeError, "gradients must be a sequence.*got 'weight'"),
    ({"gradients": ["Weight"]}, ValueError, "gradients must be of .*got 'Weight'"),
    ({"gradients": [None]}, ValueError, "gradients must be of .*got None"),
    ({"delta": 0.0}, TypeError, "delta must be one of .*got 0.0"),
    ({"memory_budget": "1GB"}, TypeError, "memory_budget must be an integer; got '1GB'"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be an integer >= 1, or None; got 0"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget must be an integer; got 1.5"),
    ({"skip_mass": 1}, ValueError, r"skip_mass must be a number in \[0, 1\); got 1"),
    ({"skip_mass": "0.1"}, TypeError, r"skip_mass must be a number in \[0, 1\); got '0.1'"),
    ({"budget": 1}, TypeError, "unexpected keyword argument 'budget'"),
]


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fp.reference.linear_sequence_logps(hidden, weight, labels).mean()


def vector(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return hidden.sum(-1)


def constant(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return hidden.detach().sum()


COMPARED: Rows = [
    ({"loss": 3}, TypeError, "loss must be a function .*; got 3"),
    ({"reference": None}, TypeError, "reference must be a function .*; got None"),
    ({"loss": lambda _: vector}, TypeError, r"loss must be a function whose result is a 0-d .*; got .* \(2, 3\)"),
    ({"reference": lambda _: vector}, TypeError, r"reference must be a function whose result .*; got .* \(2, 3\)"),
    ({"loss": lambda _: constant}, TypeError, "loss must be a differentiable function; got a result that requires no"),
    ({"logits": "random"}, TypeError, "logits must be a sequence.*; got 'random'"),
    ({"logits": None}, TypeError, "logits must be a sequence.*; got None"),
    ({"logits": ()}, ValueError, r"logits must be at least one of .*; got \(\)"),
    ({"logits": ("Random",)}, ValueError, "logits must be of .*; got 'Random'"),
    ({"dtypes": torch.float32}, TypeError, "dtypes must be a sequence.*; got torch.float32"),
    ({"dtypes": ["float32"]}, ValueError, "dtypes must be of .*; got 'float32'"),
    ({"dtypes": []}, ValueError, r"dtypes must be at least one of .*; got \[\]"),
    ({"shape": 4}, ValueError, r"shape must be \(S, T, D, V\).*; got 4"),
    ({"shape": (2, 3, 4)}, ValueError, r"shape must be \(S, T, D, V\).*; got \(2, 3, 4\)"),
    ({"shape": "2x3x4x7"}, ValueError, r"shape must be \(S, T, D, V\).*; got '2x3x4x7'"),
    ({"shape": (2.0, 3, 4, 7)}, TypeError, "shape must be an integer; got 2.0"),
    ({"device": "nowhere"}, ValueError, "device must be a device that is available here; got 'nowhere'"),
    ({"device": "meta"}, ValueError, "device must be a device that holds values; got 'meta'"),
    ({"device": None}, TypeError, "device must be a device that is available here; got None"),
    ({"seeds": "5"}, TypeError, "seeds must be an integer; got '5'"),
    ({"seeds": True}, TypeError, "seeds must be an integer; got True"),
    ({"peers": [exact]}, TypeError, r"peers must be a mapping .*; got \[<function"),
    ({"peers": {"loss": exact}}, ValueError, "peers must have other names than 'loss'"),
    ({"peers": {"reference": exact}}, ValueError, "peers must have other names than 'reference'"),
    ({"peers": {"other": 3}}, TypeError, r"peers\['other'\] must be a function .*; got 3"),
    ({"raise_exception": "no"}, TypeError, "raise_exception must be True or False; got 'no'"),
]


def load(module: Callable[[], Any]) -> Callable[..., Any]:
    """A function of the entries of a module's state that loads them into a new one, which a refusal leaves alone."""

    def loaded(**state: Any) -> None:
        fresh = module()
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        try:
            fresh.load_state_dict(state)
        except Exception:
            assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
            raise

    return loaded


PARITY = {"loss": lambda _: exact, "reference": lambda _: exact, "shape": (2, 3, 4, 7), "logits": ("random",)}
PARITY = {**PARITY, "dtypes": (torch.float32,), "seeds": 1, "raise_exception": True, "peers": None, "device": "cpu"}
FITTED = fp.DensityRatio()
FITTED.load_state_dict({"coefficients": torch.ones(3), "intercept": torch.tensor(0.5)})
SIZES = {"model": "phi-4", "device": "cpu", "dtype": "float32"}
TABLES: dict[str, tuple[Callable[..., Any], dict[str, Any], Rows]] = {
    "RewardShift": (fp.RewardShift, {"kind": "ema"}, SHIFTS),
    "RewardShift()": (fp.RewardShift(), REWARDS, REWARD_ROWS),
    "RewardShift() in evaluation": (fp.RewardShift().eval(), REWARDS, REWARD_ROWS),
    "RewardShift.load_state_dict": (load(fp.RewardShift), fp.RewardShift().state_dict(), SHIFT_STATES),
    "DensityRatio": (fp.DensityRatio, {}, RATIOS),
    "DensityRatio.fit": (lambda **given: fp.DensityRatio().fit(**given), EMBEDDINGS, FITS),
    "DensityRatio()": (FITTED, EMBEDDINGS, WEIGHINGS),
    "DensityRatio.load_state_dict": (load(fp.DensityRatio), FITTED.state_dict(), RATIO_STATES),
    "explain": (fp.explain, SIZES, EXPLAINED),
    "check_parity": (check_parity, changed(dict.fromkeys(PARITY), PARITY), COMPARED),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_unchanged_call_is_valid(name: str) -> None:
    function, arguments, _ = TABLES[name]
    function(**arguments)


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"), [(name, *row) for name, (_, _, rows) in TABLES.items() for row in rows]
)
def test_refused(name: str, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    function, arguments, _ = TABLES[name]
    assert complaint(function, changed(arguments, changes), error, match) == ""


def test_a_refusal_changes_no_shift() -> None:
    shift = fp.RewardShift()
    shift(**REWARDS)
    before = {name: value.clone() for name, value in shift.state_dict().items()}
    for changes, error, match in REWARD_ROWS:
        assert complaint(shift, changed(REWARDS, changes), error, match) == ""
    assert all(torch.equal(value, before[name]) for name, value in shift.state_dict().items())


@pytest.mark.parametrize("module", [fp.RewardShift, fp.DensityRatio])
def test_keys_of_a_state_are_those_of_the_module(module: Callable[[], Any]) -> None:
    """Missing and unexpected keys are PyTorch's to refuse, in its own way."""
    state = module().state_dict()
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{first}"'):
        module().load_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        module().load_state_dict({**state, "extra": torch.zeros(1)})
    module().load_state_dict({}, strict=False)
    with pytest.raises(TypeError, match="state_dict"):
        module().load_state_dict([state])
