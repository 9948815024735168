"""What no single value shows to be wrong: keywords that contradict each other, entries of tensors, and what stays."""

import inspect
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from malformed import FUNCTIONS, MODULES, changed, complaint, refusal, valid

import fused_pref as fp
from fused_pref import functional
from fused_pref.keywords import BCOKeywords, TokenKeywords, defaults
from fused_pref.ranks import group_of
from fused_pref.spec import transform_of

NAN, INF = float("nan"), float("inf")
SHIFT = "a RewardShift, a finite number or a 0-d"
BCO = tuple(name for name in FUNCTIONS if "bco" in name)
RATIO = "logit_scale, softcap and temperature must have ratios that float32 can hold; got one of "
RATIOS = [
    ({"softcap": 1e39}, "1e-39"),
    ({"softcap": 1e-39}, "1e+39"),
    ({"logit_scale": 1e-46}, "1e-46"),
    ({"temperature": 1e39}, "1e-39"),
]


@pytest.mark.parametrize(("given", "came"), RATIOS)
def test_ratios(given: dict[str, float], came: str) -> None:
    assert refusal(ValueError, RATIO + came, transform_of, {**defaults(TokenKeywords), **given}) == ""


@pytest.mark.parametrize(
    ("delta", "error", "message"),
    [
        ("0.1", TypeError, f"delta must be {SHIFT} tensor; got '0.1'"),
        (None, TypeError, f"delta must be {SHIFT} tensor; got None"),
        (True, TypeError, f"delta must be {SHIFT} tensor; got True"),
        (INF, ValueError, f"delta must be {SHIFT} tensor; got inf"),
        (
            torch.zeros(1),
            ValueError,
            f"delta must be {SHIFT} floating tensor; got a float32 tensor of shape (1,) on cpu",
        ),
        (torch.tensor(1), ValueError, f"delta must be {SHIFT} floating tensor; got an int64 tensor of shape () on cpu"),
        (
            torch.tensor(1j),
            ValueError,
            f"delta must be {SHIFT} floating tensor; got a complex64 tensor of shape () on cpu",
        ),
        (
            torch.tensor(0.5).to_sparse(),
            TypeError,
            "delta must be dense; got layout torch.sparse_coo: call .to_dense() first",
        ),
        (
            fp.RewardShift().to("meta"),
            ValueError,
            "delta must be a RewardShift on cpu like the other tensors; got one on meta",
        ),
    ],
)
def test_reward_shifts(delta: Any, error: type[Exception], message: str) -> None:
    assert refusal(error, message, functional.reward_shift, {"delta": delta}, torch.device("cpu")) == ""


CLASSES = {"reduction": "class_mean"}
PAIR = "class_normalizer must be a pair (n+, n-)"


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (
            {"sequence_normalizer": 4, **CLASSES},
            ValueError,
            'sequence_normalizer needs reduction="mean"; got .*class_mean',
        ),
        (
            {"class_normalizer": (1, 1)},
            ValueError,
            "class_normalizer needs reduction=\"class_mean\"; got reduction='mean'",
        ),
        (
            {"class_normalizer": (1, torch.tensor(-3.0)), **CLASSES},
            ValueError,
            r"class_normalizer must be .* >= 0; got -3.0",
        ),
        ({"class_normalizer": ("1", 1), **CLASSES}, TypeError, r"class_normalizer must be .* >= 0; got '1'"),
        *[
            ({"class_normalizer": value, **CLASSES}, TypeError, r"class_normalizer must be a pair \(n\+, n-\)")
            for value in (3, (1,), (1, 2, 3), "ab", {1: 2, 3: 4}, torch.ones(2), np.ones(2), (None, 1), (1, None))
        ],
    ],
)
def test_normalizers_of_bco(given: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"keywords": {**defaults(BCOKeywords), **given}}
    assert complaint(functional.bco_normalizers, arguments, error, match) == ""


@pytest.mark.parametrize("value", ["world", 0, True, [0, 1], dist.ProcessGroup])
def test_process_groups(value: Any) -> None:
    assert (
        complaint(lambda: group_of("g", value), {}, TypeError, "g must be a torch.distributed.ProcessGroup, .*; got")
        == ""
    )


NUMBERS: list[tuple[str, dict[str, Any]]] = [
    ("cpo", {"ignore_index": np.int64(-100), "softcap": np.float32(30), "temperature": np.float64(0.5)}),
    ("cpo", {"logit_scale": Fraction(1, 2), "logits_mean": None, "pair_normalizer": np.int32(3)}),
    ("dpo", {"beta": np.float16(0.5), "token_normalizer": torch.tensor(5)}),
    ("bco", {"beta": 1, "delta": np.float32(0.5), "sequence_normalizer": np.float64(3)}),
    ("bco", {"reduction": "class_mean", "class_normalizer": [np.int64(2), torch.tensor(2.0)]}),
    ("kto", {"beta": 1, "kl": np.float32(0.5), "desirable_weight": np.int64(2), "sequence_normalizer": np.float64(3)}),
    ("kto", {"kl": torch.tensor(0.5, dtype=torch.bfloat16), "undesirable_weight": Fraction(1, 3)}),
    ("linear_bco", {"memory_budget": np.int64(10**7), "max_valid_tokens": np.uint8(20), "skip_mass": np.float32(0.1)}),
]


@pytest.mark.parametrize(("name", "changes"), NUMBERS)
def test_numbers_of_other_kinds_are_numbers(name: str, changes: dict[str, Any]) -> None:
    name = f"{name}_loss"
    assert getattr(fp, name)(**changed(valid(name), changes)).loss.isfinite()


# Entries, which are looked at under ``checks`` alone.
SCORES = "log-prob of each (token|sequence) must be finite; got nan"
ENTRIES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BCO, {"labels": lambda y: y.index_fill(1, y.new_tensor([2]), 11)}, r"labels.*V=11\); got 11 at \[0, 2\]"),
    (BCO, {"labels": lambda y: y.index_fill(1, y.new_tensor([2]), -1)}, r"labels.*; got -1 at \[0, 2\]"),
    (
        tuple(name for name in FUNCTIONS if name.endswith(("dpo_loss", "bco_loss", "kto_loss"))),
        {"ref_logps": torch.tensor([0, 0, NAN, 0])},
        r"ref_logps must be finite; got nan at \[2\]",
    ),
    (BCO, {"sample_weight": torch.tensor([1, 1, -1.0, 1])}, r"sample_weight must be >= 0; got -1.0 at \[2\]"),
    (BCO, {"sample_weight": torch.tensor([1, 1, 1, INF])}, r"sample_weight must be >= 0; got inf at \[3\]"),
    (BCO, {"delta": torch.tensor(NAN)}, "delta must be finite; got nan"),
    (("kto_loss", "linear_kto_loss"), {"kl": torch.tensor(NAN)}, "kl must be finite; got nan"),
    (tuple(name for name in FUNCTIONS if "linear" not in name), {"logits": lambda z: z * NAN}, SCORES),
    (tuple(name for name in FUNCTIONS if "linear" in name), {"hidden": lambda h: h * NAN}, SCORES),
]


@pytest.mark.parametrize(("names", "changes", "match"), ENTRIES)
def test_entries_are_looked_at_on_request(names: tuple[str, ...], changes: dict[str, Any], match: str) -> None:
    for name in names:
        arguments = changed(valid(name), changes)
        with fp.checks():
            assert complaint(getattr(fp, name), arguments, ValueError, match) == ""
        getattr(fp, name)(**arguments)


def test_checks_take_no_arguments() -> None:
    with pytest.raises(TypeError, match=r"checks\(\) takes 0 positional arguments but 1 was given"):
        fp.checks(True)  # type: ignore[call-arg]


def test_checks_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = valid("cpo_loss")
    arguments["labels"][0, 2] = 11
    monkeypatch.setenv("FUSED_PREF_CHECKS", "1")
    assert complaint(fp.cpo_loss, arguments, ValueError, r"labels.*got 11 at \[0, 2\]") == ""
    monkeypatch.setenv("FUSED_PREF_CHECKS", "0")
    assert fp.cpo_loss(**arguments).loss.isnan()


@pytest.mark.parametrize("name", BCO)
def test_failed_call_changes_nothing(name: str) -> None:
    shift, function = fp.RewardShift(), getattr(fp, name)
    arguments = valid(name)
    function(**arguments, delta=shift)
    before = {key: value.clone() for key, value in shift.state_dict().items()}
    inputs = {key: value.clone() for key, value in arguments.items()}
    for bad in ({"beta": 0.0}, {"sample_weight": torch.ones(3)}, {"temperature": 0.0}, {"class_normalizer": (1, 2)}):
        with pytest.raises(ValueError, match=r"must be|needs"):
            function(**arguments, delta=shift, **bad)
    assert all(torch.equal(value, before[key]) for key, value in shift.state_dict().items())
    assert all(torch.equal(value, inputs[key]) for key, value in arguments.items())


def test_triton_backend_refuses_float64() -> None:
    arguments = {**changed(valid("cpo_loss"), {"logits": lambda z: z.double()}), "backend": "triton"}
    assert complaint(fp.cpo_loss, arguments, TypeError, 'float64.*backend="torch"') == ""


def test_signatures_agree() -> None:
    """Function, reference and module show the same keywords with the same defaults."""
    for name in FUNCTIONS:
        assert inspect.signature(getattr(fp, name)) == inspect.signature(getattr(fp.reference, name)), name
    for module, name in MODULES.items():
        parameters = inspect.signature(getattr(fp, name)).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        taken = [p for p in inspect.signature(getattr(fp, module)).parameters.values() if p.name != "objective"]
        assert keywords == taken
        assert all(f"\n    {p.name} (default" in (getattr(fp, name).__doc__ or "") for p in keywords)
