"""What the reward shift and the density ratio refuse: at construction, in a call, and in what they load."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from malformed import changed, complaint

import fused_pref as fp

NAN, INF = float("nan"), float("inf")
REWARDS = {"rewards": torch.zeros(4), "desirable": torch.tensor([True, False, True, False])}
EMBEDDINGS = {"embeddings": torch.randn(4, 3), "desirable": torch.tensor([True, False, True, False])}
Rows = list[tuple[dict[str, Any], type[Exception], str]]
SHIFTS: Rows = [
    ({"kind": "EMA"}, ValueError, "kind must be one of .*got 'EMA'"),
    ({"decay": 1.0}, ValueError, r"decay must be a number in \[0, 1\); got 1.0"),
    ({"value": INF}, ValueError, "value must be a finite number; got inf"),
    ({"update": "epoch"}, ValueError, "update must be one of .*'step'.*got 'epoch'"),
    ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup.*; got 'world'"),
    ({"momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
]
REWARD_ROWS: Rows = [
    ({"rewards": [0.0] * 4}, TypeError, r"rewards must be .* tensor \(S,\); got \[0.0"),
    ({"rewards": torch.zeros(4, 1)}, ValueError, r"rewards must be \(S,\); got .* \(4, 1\)"),
    ({"rewards": torch.tensor(0.0)}, ValueError, r"rewards must be \(S,\); got .* \(\)"),
    ({"desirable": torch.ones(4)}, TypeError, r"desirable must be a bool tensor \(S,\); got a float32"),
    ({"desirable": lambda d: d[:3]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(3,\)"),
    ({"rewards": REWARDS["desirable"], "desirable": REWARDS["rewards"]}, TypeError, "rewards must .*got a bool tensor"),
]
SHIFT_STATES: Rows = [
    ({"mean": torch.zeros(3)}, ValueError, r"state_dict\['mean'\] must be \(2,\); got .* \(3,\)"),
    ({"count": torch.tensor([1, -1])}, ValueError, r"state_dict\['count'\] must be finite and >= 0; got \[1, -1\]"),
    ({"pending_sum": torch.tensor([INF, 0])}, ValueError, r"state_dict\['pending_sum'\] must be finite; got \[inf"),
    ({"pending_count": torch.ones(2)}, TypeError, r"state_dict\['pending_count'\] must be an int64 .*got a float32"),
]
RATIOS: Rows = [
    ({"min_ratio": 0}, ValueError, "min_ratio must be a finite number > 0; got 0"),
    ({"min_ratio": 20}, ValueError, r"max_ratio must be >= min_ratio = 20.0; got 10.0"),
    ({"max_ratio": INF}, ValueError, "max_ratio must be a finite number > 0; got inf"),
    ({"sample_size": 1}, ValueError, "sample_size must be an integer >= 2, or None; got 1"),
    ({"seed": None}, TypeError, "seed must be an integer; got None"),
    ({"seed": 2**64}, ValueError, "seed must be an integer of 64 bits.*; got 18446744073709551616"),
    ({"ratio": 1}, TypeError, "unexpected keyword argument 'ratio'"),
]
FITS: Rows = [
    ({"embeddings": [[1.0, 2.0], [3.0], [], []]}, TypeError, r"embeddings must be .*; got \[\["),
    ({"embeddings": np.array(["a", "b", "c", "d"])}, TypeError, r"embeddings must be .*; got array"),
    ({"embeddings": "a sentence"}, TypeError, "embeddings must be .*; got 'a sentence'"),
    ({"embeddings": lambda e: e[:, :0]}, ValueError, r"embeddings must be \(M, E\) with E >= 1; got .* \(4, 0\)"),
    ({"embeddings": lambda e: e[0]}, ValueError, r"embeddings must be \(M, E\).*; got .* \(3,\)"),
    ({"embeddings": lambda e: e / 0}, ValueError, "embeddings must be finite; got NaN or infinity"),
    ({"desirable": lambda d: d.long()}, TypeError, r"desirable must be a bool tensor \(M,\); got an int64 tensor"),
    ({"desirable": lambda d: d[:3]}, ValueError, r"desirable must be \(M,\) = \(4,\); got .* \(3,\)"),
    ({"desirable": lambda d: d & False}, ValueError, "desirable must hold both classes.*; got 0 of 4"),
    ({"desirable": lambda d: d | True}, ValueError, "desirable must hold both classes.*; got 4 of 4"),
]
WEIGHINGS: Rows = [
    ({"embeddings": lambda e: e[0]}, ValueError, r"embeddings must be \(S, E=3\); got .* \(3,\)"),
    ({"embeddings": lambda e: e[:, :2]}, ValueError, r"embeddings must be \(S, E=3\); got .* \(4, 2\)"),
    ({"embeddings": None}, TypeError, "embeddings must be .*; got None"),
    ({"desirable": lambda d: d[:, None]}, ValueError, r"desirable must be \(S,\) = \(4,\); got .* \(4, 1\)"),
    ({"desirable": ["yes"] * 4}, TypeError, r"desirable must be a bool tensor \(S,\); got \['yes"),
]
RATIO_STATES: Rows = [
    ({"coefficients": torch.ones(1, 3)}, ValueError, r"state_dict\['coefficients'\] must be \(E,\).*got .* \(1, 3\)"),
    ({"coefficients": torch.tensor([1, NAN])}, ValueError, r"state_dict\['coefficients'\] must be finite; got .1.0, n"),
    ({"intercept": torch.zeros(1)}, ValueError, r"state_dict\['intercept'\] must be \(\); got .* \(1,\)"),
    ({"intercept": torch.tensor(INF)}, ValueError, r"state_dict\['intercept'\] must be finite; got inf"),
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


FITTED = fp.DensityRatio()
FITTED.load_state_dict({"coefficients": torch.ones(3), "intercept": torch.tensor(0.5)})
TABLES: dict[str, tuple[Callable[..., Any], dict[str, Any], Rows]] = {
    "RewardShift": (fp.RewardShift, {"kind": "ema"}, SHIFTS),
    "RewardShift()": (fp.RewardShift(), REWARDS, REWARD_ROWS),
    "RewardShift() in evaluation": (fp.RewardShift().eval(), REWARDS, REWARD_ROWS),
    "RewardShift.load_state_dict": (load(fp.RewardShift), fp.RewardShift().state_dict(), SHIFT_STATES),
    "DensityRatio": (fp.DensityRatio, {}, RATIOS),
    "DensityRatio.fit": (lambda **given: fp.DensityRatio().fit(**given), EMBEDDINGS, FITS),
    "DensityRatio()": (FITTED, EMBEDDINGS, WEIGHINGS),
    "DensityRatio.load_state_dict": (load(fp.DensityRatio), FITTED.state_dict(), RATIO_STATES),
}


@pytest.mark.parametrize("name", TABLES)
def test_refused(name: str) -> None:
    function, arguments, rows = TABLES[name]
    function(**arguments)
    wrong = [complaint(function, changed(arguments, changes), error, match) for changes, error, match in rows]
    assert [text for text in wrong if text] == []


def test_a_refusal_changes_no_shift() -> None:
    shift = fp.RewardShift()
    shift(**REWARDS)
    before = {name: value.clone() for name, value in shift.state_dict().items()}
    for changes, error, match in REWARD_ROWS:
        assert complaint(shift, changed(REWARDS, changes), error, match) == ""
    assert all(torch.equal(value, before[name]) for name, value in shift.state_dict().items())


def test_a_ratio_must_be_fitted_first() -> None:
    assert complaint(fp.DensityRatio(), EMBEDDINGS, RuntimeError, r"no coefficients: call fit\(\) or") == ""


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
