"""Every argument of every function and module reaches its validator: one value just beyond what it takes, refused in
exactly the words of ``test_validate.py``.
"""

import ast
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from malformed import FUNCTIONS, MODULES, built, refusal, valid

import fused_pref as fp
from fused_pref import keywords, validate

NAN = float("nan")
FLOATS = "a float32 or bfloat16 or float16 or float64 tensor"
GROUP = ("world", TypeError, "a torch.distributed.ProcessGroup, a 1-d DeviceMesh or None")
# argument: value, error, what must come in its place; flags and names are found in the tables of keywords
ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "logits": ([0.0], TypeError, f"{FLOATS} (S, T, V) without cu_seqlens"),
    "hidden": ([0.0], TypeError, f"{FLOATS} (S, T, D) without cu_seqlens"),
    "weight": ([0.0], TypeError, "a float32 tensor (V, D=6)"),
    "labels": ([0], TypeError, "an int64 or int32 tensor (S, T)"),
    "desirable": ([True] * 4, TypeError, "a bool tensor (S,)"),
    "ref_logps": ([0.0], TypeError, f"{FLOATS} (S,)"),
    "objective": (3, TypeError, "a function of Sequences"),
    "token_weight": ([1.0], TypeError, "a tensor (S, T) or None"),
    "unit": (3, ValueError, "2 (pairs), 1 (sequences) or None (the batch)"),
    "normalizer": (0, ValueError, "a finite number or 0-d tensor > 0"),
    "cu_seqlens": ([0, 20], TypeError, "a tensor (S+1,) or None"),
    "bias": ([0.0], TypeError, "a tensor (V,) or None"),
    "sample_weight": ([1.0] * 4, TypeError, "a tensor (S,) or None"),
    "cp_group": GROUP,
    "tp_group": GROUP,
    "ignore_index": (-100.0, TypeError, "an integer"),
    "softcap": (0.0, ValueError, "a finite number > 0"),
    "logit_scale": (-0.0, ValueError, "a finite number other than 0"),
    "temperature": (0, ValueError, "a finite number > 0"),
    "memory_budget": (0, ValueError, "an integer >= 1, or None"),
    "max_valid_tokens": (-1, ValueError, "an integer >= 0, or None"),
    "skip_mass": (1, ValueError, "a number in [0, 1)"),
    "beta": (0.0, ValueError, "a finite number > 0"),
    "label_smoothing": (1.0, ValueError, "a number in [0, 1)"),
    "pair_normalizer": (0, ValueError, "a finite number or 0-d tensor > 0"),
    "token_normalizer": (-1, ValueError, "a finite number or 0-d tensor >= 0"),
    "cpo_alpha": (-1e-9, ValueError, "a finite number >= 0"),
    "simpo_gamma": (NAN, ValueError, "a finite number"),
    "alpha": (NAN, ValueError, "a finite number"),
    "loss_weights": (1.0, TypeError, "a sequence of 1 numbers, one for each name of loss_type, or None"),
    "discopop_tau": (0, ValueError, "a finite number > 0"),
    "f_alpha_divergence_coef": (NAN, ValueError, "a finite number"),
    "delta": (NAN, ValueError, "a RewardShift, a finite number or a 0-d tensor"),
    "kl": (NAN, ValueError, "a finite number or a 0-d tensor"),
    "desirable_weight": (-1e-9, ValueError, "a finite number >= 0"),
    "undesirable_weight": (-1, ValueError, "a finite number >= 0"),
    "sequence_normalizer": (0.0, ValueError, "a finite number or 0-d tensor > 0"),
    "class_normalizer": ((1, -1), ValueError, "a finite number or 0-d tensor >= 0"),
}
# What must be given beside a malformed value, for it to be of use.
BESIDE = {"class_normalizer": {"reduction": "class_mean"}}
# What a message shows, where it is not the value.
SHOWN = {"class_normalizer": -1}


def row(name: str, table: type) -> tuple[Any, type[Exception], str]:
    """A malformed value of an argument, and how it is refused."""
    if name == "ref_logps" and "unit" in keywords.table(table):
        return [0.0], TypeError, "a tensor (S,) or None"
    if name in ROWS:
        return ROWS[name]
    kind = keywords.table(table)[name][0]
    if kind is bool:
        return 1, TypeError, "True or False"
    allowed = (*keywords.choices(table, name), *((None,) if type(None) in get_args(kind) else ()))
    return "neither", ValueError, f"one of {allowed}"


def takers(name: str) -> Iterator[tuple[str, type, Callable[..., Any]]]:
    """What takes an argument: functions, and modules, at construction or in a call; each with the rest of a call."""
    for function, table in FUNCTIONS.items():
        call, given = getattr(fp, function), valid(function)
        if name in inspect.signature(call).parameters:
            yield function, table, functools.partial(call, **{key: given[key] for key in given if key != name})
    for module, function in MODULES.items():
        build, given, table = built(module), valid(module), FUNCTIONS[function]
        if name in inspect.signature(getattr(fp, module)).parameters:
            yield module, table, getattr(fp, module) if name == "objective" else build
        if name in inspect.signature(getattr(fp, module).forward).parameters:
            rest = {key: given[key] for key in given if key != name}
            yield f"{module}()", table, functools.partial(build(**BESIDE.get(name, {})), **rest)


def accepted_otherwise(name: str) -> list[str]:
    """What is wrong with how an argument is refused by all that take it. Without ``assert``, for ``-O``."""
    found = []
    for taker, table, call in takers(name):
        value, error, expected = row(name, table)
        message = f"{name} must be {expected}; got {validate.describe(SHOWN.get(name, value))}"
        beside = {} if taker.endswith("()") else BESIDE.get(name, {})
        found.append((taker, refusal(error, message, call, **beside, **{name: value})))
    return [f"{taker}: {text}" for taker, text in found if text]


ARGUMENTS = sorted(
    {name for function in FUNCTIONS for name in inspect.signature(getattr(fp, function)).parameters} - {"tensors"}
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_unchanged_call_is_valid(name: str, packed: bool) -> None:
    output = getattr(fp, name)(**valid(name, packed=packed))
    assert getattr(output, "loss", output).isfinite().all()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_reaches_its_validator(name: str) -> None:
    assert accepted_otherwise(name) == []


def test_all_that_takes_arguments_is_looked_at() -> None:
    assert set(ROWS) <= set(ARGUMENTS)
    assert [taker for taker, _, _ in takers("labels")] == [*FUNCTIONS, *(f"{module}()" for module in MODULES)]
    assert len(list(takers("temperature"))) == len(FUNCTIONS) + len(MODULES)
    assert [taker for taker, _, _ in takers("sample_weight")][2:] == [
        "BCOLoss",
        "BCOLoss()",
        "LinearBCOLoss",
        "LinearBCOLoss()",
    ]
    public = {name for name in fp.__all__ if name.endswith(("_loss", "_logps"))}
    assert public == set(FUNCTIONS)
    assert {name for name in fp.__all__ if name.endswith("Loss")} == set(MODULES)


@pytest.mark.slow
def test_optimised_python_refuses_the_same() -> None:
    program = "from test_wiring import *; print(__debug__, [x for name in ARGUMENTS for x in accepted_otherwise(name)])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-O", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "False []\n", done.stdout + done.stderr


def test_the_library_validates_without_assert() -> None:
    for path in Path(fp.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)], path


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_other_keywords_are_refused(name: str) -> None:
    """Misspelt ones, and those of others; of references too."""
    own = inspect.signature(getattr(fp, name)).parameters
    foreign = ["betta", "Shift", *(argument for argument in ARGUMENTS if argument not in own)]
    for home in (fp,) if name in MODULES else (fp, fp.reference):
        call = built(name) if name in MODULES else functools.partial(getattr(home, name), **valid(name))
        for keyword in foreign:
            message = f"{name}{'.__init__' * (name in MODULES)}() got an unexpected keyword argument {keyword!r}"
            assert refusal(TypeError, message, call, **{keyword: 0.1}) == ""


@pytest.mark.parametrize("name", [name for name in (*FUNCTIONS, *MODULES) if "preference" in name.lower()])
def test_tensors_of_an_objective_go_by_position(name: str) -> None:
    """Under the name that the signature shows for them, they would be lost."""
    call, shown = (built(name)(), f"{name}.forward") if name in MODULES else (getattr(fp, name), name)
    message = f"{shown}() got an unexpected keyword argument 'tensors'"
    assert refusal(TypeError, message, call, **valid(name), tensors=(torch.zeros(4),)) == ""


@pytest.mark.parametrize("name", MODULES)
def test_a_module_takes_its_hyperparameters_at_construction_alone(name: str) -> None:
    for keyword in ("beta", "ignore_index"):
        message = f"{name}.forward() got an unexpected keyword argument {keyword!r}"
        assert refusal(TypeError, message, built(name)(), **valid(name), **{keyword: 0}) == ""


@pytest.mark.parametrize("name", [name for name in (*FUNCTIONS, *MODULES) if "preference" not in name.lower()])
def test_positional_arguments(name: str) -> None:
    """One that is missing, one too many, and one that is given twice."""
    module = name in MODULES
    arguments = valid(name)
    call = getattr(fp, name)() if module else getattr(fp, name)
    shown, number = (f"{name}.forward" if module else name), len(arguments) + module
    much = f"takes {number} positional arguments but {number + 1} were given"
    with pytest.raises(TypeError, match=rf"{shown}\(\) missing 1 required positional argument"):
        call(*list(arguments.values())[:-1])
    with pytest.raises(TypeError, match=rf"{shown}\(\) {much}"):
        call(*arguments.values(), -100)
    with pytest.raises(TypeError, match=rf"{shown}\(\) got multiple values for argument 'labels'"):
        call(*arguments.values(), labels=arguments["labels"])
    if module:
        with pytest.raises(TypeError, match=r"__init__\(\) takes 1 positional argument but 2 were given"):
            getattr(fp, name)(0.1)
