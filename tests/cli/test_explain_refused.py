"""What ``explain`` refuses: every argument once, and what contradicts another."""

import inspect
from typing import Any

import pytest
import torch
from malformed import complaint

import fused_pref as fp

Row = tuple[dict[str, Any], type[Exception], str]
ROWS: list[Row] = [
    ({"model": "Phi-4"}, ValueError, "model must be one of .*got 'Phi-4'"),
    ({"model": None}, ValueError, "model must be one of .*, or hidden and vocab given; got None"),
    ({"model": None, "hidden": 4}, ValueError, "model must be one of .*, or hidden and vocab given; got None"),
    ({"hidden": 0}, ValueError, "hidden must be an integer >= 1; got 0"),
    ({"vocab": 0}, ValueError, "vocab must be an integer >= 1; got 0"),
    ({"tokens": -1}, ValueError, "tokens must be an integer >= 0; got -1"),
    ({"sequences": 0}, ValueError, "sequences must be an integer >= 1, or None; got 0"),
    ({"sequences": 3}, ValueError, "sequences must be even: pairs of chosen and rejected; got 3"),
    ({"positions": 8191}, ValueError, "positions must be an integer >= 8192; got 8191"),
    ({"objective": "CPO"}, ValueError, "objective must be one of .*got 'CPO'"),
    ({"dtype": "int8"}, ValueError, "dtype must be one of .*got 'int8'"),
    ({"dtype": torch.int8}, ValueError, "dtype must be one of .*got torch.int8"),
    ({"dtype": None}, ValueError, "dtype must be one of .*got None"),
    ({"device": "cuda:0"}, ValueError, "device must be one of .*got 'cuda:0'"),
    ({"device": torch.device("cpu")}, TypeError, "device must be one of .*got device"),
    ({"gradients": "weight"}, TypeError, "gradients must be a sequence.*got 'weight'"),
    ({"gradients": ["Weight"]}, ValueError, "gradients must be of .*got 'Weight'"),
    ({"delta": 0.0}, TypeError, "delta must be one of .*got 0.0"),
    *(
        ({"objective": name, "delta": "known"}, ValueError, f"delta must be 'batch', .*objective='{name}'.*got 'known'")
        for name in ("cpo", "dpo", "kto", "batch", "logps")
    ),
    ({"memory_budget": 0}, ValueError, "memory_budget must be an integer >= 1, or None; got 0"),
    ({"memory_budget": 1}, ValueError, "memory_budget must be at least"),
    ({"device_memory": 0, "device": "sm_80"}, ValueError, "device_memory must be an integer >= 1; got 0"),
    ({"device_memory": 1 << 30}, ValueError, "device_memory must be None on a CPU"),
    ({"skip_mass": 1}, ValueError, r"skip_mass must be a number in \[0, 1\); got 1"),
]
ARGUMENTS = {"model": "phi-4", "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(("changes", "error", "match"), ROWS)
def test_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaint(fp.explain, {**ARGUMENTS, **changes}, error, match) == ""


def test_every_argument_is_looked_at() -> None:
    assert {name for changes, _, _ in ROWS for name in changes} == set(inspect.signature(fp.explain).parameters)
    assert complaint(fp.explain, {**ARGUMENTS, "budget": 1}, TypeError, "unexpected keyword argument 'budget'") == ""
