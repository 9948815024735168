"""Every validator by itself: what it takes, what it refuses, and the words that it refuses it with."""

import inspect
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from malformed import refusal

import fused_pref as fp
from fused_pref import validate
from fused_pref.keywords import DPOKeywords, defaults
from fused_pref.losses.pair_spec import dpo_spec

# PyTorch's own words of tensors that are refused.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
NAN, INF, HUGE = float("nan"), float("inf"), 10**400
META = torch.tensor(1.0, device="meta")
CPU = torch.device("cpu")

# value, error
Rows = list[tuple[Any, type[Exception]]]
NOT_NUMBERS: Rows = [
    *((value, TypeError) for value in ("0.5", b"1", None, True, np.True_, 1j, [0.5], (1,), {}, np.array(0.5))),
    *((value, TypeError) for value in (torch.tensor(0.5), Decimal("0.5"), float)),
    *((value, ValueError) for value in (HUGE, Fraction(HUGE, 3), -INF, INF, NAN, np.float32(NAN))),
]
NUMBERS = (1, 0.5, np.float16(0.5), np.float32(0.5), np.int64(1), np.uint8(1), Fraction(1, 2))
NOT_INTEGERS: Rows = [
    (value, TypeError)
    for value in ("3", 3.0, True, np.True_, np.float64(3), Fraction(3), Decimal(3), 1j, [3], torch.tensor(3))
]
BEYOND: Rows = [(2**63, ValueError), (-(2**63) - 1, ValueError), (HUGE, ValueError)]
COUNTS: Rows = [
    *((value, TypeError) for value in ("4", None, True, 1j, [4], (1, 2), np.array([4.0]), Decimal(4))),
    *((value, ValueError) for value in (-2, NAN, INF, HUGE, np.float32(-1))),
    *((torch.tensor(value), ValueError) for value in (True, 1j)),
    *((value, ValueError) for value in (torch.ones(1), torch.ones(2, 2))),
]
CHOICE = ("all", "one", None)
# Tensors that no argument takes, made of one that is taken; what is said of them.
TENSORS: list[tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = [
    (lambda x: x.to_sparse(), TypeError, "dense; got layout torch.sparse_coo: call .to_dense() first"),
    (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        TypeError,
        "dense; got a qint8 tensor of shape (2, 3) on cpu: call .dequantize() first",
    ),
    (
        lambda x: torch.nested.nested_tensor([x]),
        TypeError,
        "dense; got a float32 tensor nested on cpu: pack its sequences (cu_seqlens) or pad them",
    ),
    (lambda x: x.to("meta"), ValueError, "on a device that holds values; got a float32 tensor of shape (2, 3) on meta"),
    *[
        (change, TypeError, f"a float32 or bfloat16 tensor (S, T); got {came}")
        for change, came in (
            (lambda x: None, "None"),
            (lambda x: 3, "3"),
            (lambda x: "x", "'x'"),
            (lambda x: [0.0], "[0.0]"),
            (lambda x: x[:1, :2].numpy(), "array([[0., 0.]], dtype=float32)"),
            (lambda x: x > 0, "a bool tensor of shape (2, 3) on cpu"),
            (lambda x: x.to(torch.complex64), "a complex64 tensor of shape (2, 3) on cpu"),
            (lambda x: x.to(torch.float8_e4m3fn), "a float8_e4m3fn tensor of shape (2, 3) on cpu"),
            (lambda x: x.half(), "a float16 tensor of shape (2, 3) on cpu"),
            (lambda x: x.long(), "an int64 tensor of shape (2, 3) on cpu"),
        )
    ],
    *[
        (change, ValueError, f"(S, T) = (2, 3); got a float32 tensor of shape {came} on cpu")
        for change, came in (
            (lambda x: x.sum(), "()"),
            (lambda x: x[0], "(3,)"),
            (lambda x: x.t(), "(3, 2)"),
            (lambda x: x[None], "(1, 2, 3)"),
            (lambda x: x[:1], "(1, 3)"),
            (lambda x: x[:0], "(0, 3)"),
        )
    ],
]


def in_words(expected: str, rows: Rows) -> list[tuple[Any, type[Exception], str]]:
    return [(value, error, f"be {expected}; got {validate.describe(value)}") for value, error in rows]


def choices(value: Any, empty: bool = True) -> None:
    validate.choices("x", value, ("a", "b"), empty=empty)


def tensor(value: Any) -> Any:
    return validate.tensor("x", value, "(S, T)", (2, 3), (torch.float32, torch.bfloat16), CPU)


def boundaries(value: Any) -> Any:
    return validate.boundaries("x", value, 14, CPU)


def saved(value: Any) -> None:
    validate.saved({"x": value}, "x", "(2,)", (2,), validate.FLOATS)


def saved_count(value: Any) -> None:
    validate.saved({"x": value}, "x", "(2,)", (2,), validate.INTEGERS, negative=False)


def values(value: Any) -> None:
    with fp.checks():
        validate.values("x", value, torch.isfinite, "finite")


SIXTY_FOUR = f"an integer of 64 bits, at most {2**63 - 1}"
ENDS = torch.tensor([0, 4, 9, 11, 14])
FALLING = "start at 0, never fall and end at N_total = 14; got "
FINITE = "a finite number"
NORMALIZER = "a finite number or 0-d tensor"
# validator: how it is called, what it takes, what it refuses and what it says
VALIDATORS: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...], list[tuple[Any, type[Exception], str]]]] = {
    "finite": (lambda x: validate.finite("x", x), (*NUMBERS, -3, 0), in_words(FINITE, NOT_NUMBERS)),
    "positive": (
        lambda x: validate.positive("x", x),
        (*NUMBERS, 5e-324),
        in_words(
            f"{FINITE} > 0",
            [*NOT_NUMBERS, *((x, ValueError) for x in (0, 0.0, -0.0, -3, np.float64(0), Fraction(-1, 2)))],
        ),
    ),
    "not_negative": (
        lambda x: validate.not_negative("x", x),
        (*NUMBERS, 0, -0.0),
        in_words(f"{FINITE} >= 0", [*NOT_NUMBERS, *((x, ValueError) for x in (-5e-324, -3, Fraction(-1, 2)))]),
    ),
    "scalar": (
        lambda x: validate.scalar("x", x),
        (*NUMBERS, -3, torch.tensor(0.5), torch.tensor(-2, dtype=torch.bfloat16), torch.tensor(NAN)),
        [
            *in_words(
                f"{FINITE} or a 0-d tensor", [row for row in NOT_NUMBERS if not isinstance(row[0], torch.Tensor)]
            ),
            *in_words(
                f"{FINITE} or a 0-d floating tensor",
                [(x, ValueError) for x in (torch.zeros(1), torch.tensor(2), torch.tensor(True), torch.tensor(1j))],
            ),
        ],
    ),
    "within": (
        lambda x: validate.within("x", x, 0, 1),
        (0, 0.0, 0.999, np.float32(0.5), Fraction(1, 2)),
        in_words("a number in [0, 1)", [*NOT_NUMBERS, *((x, ValueError) for x in (1, np.float32(1), 2, -1e-9))]),
    ),
    "flag": (
        lambda x: validate.flag("x", x),
        (True, False),
        in_words("True or False", [(x, TypeError) for x in (0, 1, "True", None, np.True_, torch.tensor(True))]),
    ),
    "integer": (
        lambda x: validate.integer("x", x),
        (0, -100, 2**63 - 1, -(2**63), np.int64(-100), np.uint8(3)),
        [*in_words("an integer", [*NOT_INTEGERS, (None, TypeError)]), *in_words(SIXTY_FOUR, BEYOND)],
    ),
    "at_least": (
        lambda x: validate.at_least("x", x, 2),
        (2, np.int64(10**7)),
        [
            *in_words("an integer", [*NOT_INTEGERS, (None, TypeError)]),
            *in_words(SIXTY_FOUR, BEYOND),
            *in_words("an integer >= 2", [(1, ValueError), (-5, ValueError)]),
        ],
    ),
    "at_least, or None": (
        lambda x: validate.at_least("x", x, 1, optional=True),
        (None, 1),
        [*in_words("an integer", NOT_INTEGERS), *in_words("an integer >= 1, or None", [(0, ValueError)])],
    ),
    "choice": (
        lambda x: validate.choice("x", x, CHOICE),
        CHOICE,
        in_words(
            f"one of {CHOICE}",
            [
                *((x, ValueError) for x in ("All", "", "none")),
                *((x, TypeError) for x in (b"all", True, 0, ["all"], ("all",), fp.RewardShift)),
            ],
        ),
    ),
    "choices": (
        choices,
        ((), [], ["a"], ("b", "a"), {"a"}),
        [
            *in_words("a sequence, of ('a', 'b')", [(x, TypeError) for x in ("a", None, 3, torch.float32)]),
            (["A"], ValueError, "be of ('a', 'b'); got 'A'"),
            (("a", None), ValueError, "be of ('a', 'b'); got None"),
        ],
    ),
    "choices, one at least": (
        lambda x: choices(x, empty=False),
        (["a"],),
        in_words("at least one of ('a', 'b')", [((), ValueError), ([], ValueError)]),
    ),
    "tensor_or_none": (
        lambda x: validate.tensor_or_none("x", x, "(V,)"),
        (None, torch.zeros(2)),
        in_words("a tensor (V,) or None", [(x, TypeError) for x in ([0.0], 0.0, False, np.zeros(2), "0")]),
    ),
    "boundaries": (
        boundaries,
        (ENDS, ENDS.int(), torch.tensor([0, 0, 14, 14])),
        [
            *in_words(
                "an int32 or int64 tensor (S+1,)", [(x, TypeError) for x in ([0, 14], "0,14", np.array([0, 14]))]
            ),
            *in_words(
                "an int32 or int64 tensor (S+1,)",
                [(ENDS.to(kind), TypeError) for kind in (torch.int16, torch.float64, torch.bool, torch.uint64)],
            ),
            *in_words("(S+1,) with S+1 >= 1", [(x, ValueError) for x in (ENDS[None], ENDS[0], ENDS[:0])]),
            (ENDS[:-1], ValueError, f"{FALLING}[0, 4, 9, 11] ending at 11"),
            (ENDS + 1, ValueError, f"{FALLING}[1, 5, 10, 12, 15] ending at 15"),
            (ENDS.flip(0), ValueError, f"{FALLING}[14, 11, 9, 4, 0] ending at 0"),
            (ENDS[[0, 2, 1, 3, 4]], ValueError, f"{FALLING}[0, 9, 4, 11, 14] ending at 14"),
            (torch.arange(1, 14), ValueError, f"{FALLING}[1, 2, 3, 4, 5, 6, 7, 8]… ending at 13"),
            (
                ENDS.to("meta"),
                ValueError,
                "be on a device that holds values; got an int64 tensor of shape (5,) on meta",
            ),
        ],
    ),
    "normalizer": (
        lambda x: validate.normalizer("x", x),
        (3, 0.5, np.float32(2), np.int32(3), torch.tensor(5), torch.tensor(2.0)),
        [
            *in_words(f"{NORMALIZER} > 0", [*COUNTS, (0, ValueError), (0.0, ValueError)]),
            (torch.tensor(INF), ValueError, f"be {NORMALIZER} > 0; got inf"),
            (torch.tensor(-3), ValueError, f"be {NORMALIZER} > 0; got -3"),
            (torch.tensor(0.0), ValueError, f"be {NORMALIZER} > 0; got 0.0"),
            (META, ValueError, f"be on a device that holds values; got {validate.describe(META)}"),
            (torch.tensor(1.0).to_sparse(), TypeError, "be dense; got layout torch.sparse_coo: call .to_dense() first"),
        ],
    ),
    "normalizer, or 0": (
        lambda x: validate.normalizer("x", x, zero=True),
        (0, 0.0, torch.tensor(0), 3),
        in_words(f"{NORMALIZER} >= 0", COUNTS),
    ),
}
STATES: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...], list[tuple[Any, type[Exception], str]]]] = {
    "saved": (
        saved,
        (torch.zeros(2), torch.tensor([-1.0, 2.0]).double()),
        [
            (torch.tensor([0.0, NAN]), ValueError, "finite; got [0.0, nan]"),
            (torch.tensor([INF, 0]), ValueError, "finite; got [inf, 0.0]"),
            *in_words("(2,)", [(torch.zeros(3), ValueError)]),
            (torch.zeros(2).cfloat(), TypeError, "; got a complex64 tensor of shape (2,) on cpu"),
            ([0.0, 0.0], TypeError, "tensor (2,); got [0.0, 0.0]"),
            (None, TypeError, "tensor (2,); got None"),
        ],
    ),
    "saved, a count": (
        saved_count,
        (torch.tensor([0, 3]),),
        [
            (torch.tensor([1, -1]), ValueError, "finite and >= 0; got [1, -1]"),
            (torch.ones(2), TypeError, "an int64 or int32 tensor (2,); got a float32 tensor of shape (2,) on cpu"),
        ],
    ),
}


@pytest.mark.parametrize("name", VALIDATORS)
def test_validator(name: str) -> None:
    validator, taken, refused = VALIDATORS[name]
    for value in taken:
        validator(value)
    wrong = [refusal(error, f"x must {text}", validator, value) for value, error, text in refused]
    assert [text for text in wrong if text] == []


def test_tensor() -> None:
    good = torch.zeros(2, 3)
    for value in (good, torch.zeros(3, 2).t(), good.bfloat16(), good[:, :1].expand(2, 3), good.requires_grad_()):
        assert tensor(value) is value
    wrong = [refusal(error, f"x must be {text}", tensor, change(torch.zeros(2, 3))) for change, error, text in TENSORS]
    assert [text for text in wrong if text] == []
    assert validate.tensor("x", good.half(), "(…)", None, ()).dtype is torch.float16
    elsewhere = torch.device("cuda")
    message = "x must be on cuda like the other tensors; got a float32 tensor of shape (2, 3) on cpu"
    assert refusal(ValueError, message, validate.tensor, "x", good, "(S, T)", (2, 3), (), elsewhere) == ""


@pytest.mark.parametrize("name", STATES)
def test_entries_of_a_state(name: str) -> None:
    validator, taken, refused = STATES[name]
    for value in taken:
        validator(value)
    for value, error, text in refused:
        with pytest.raises(error) as caught:
            validator(value)
        assert str(caught.value).startswith("state_dict['x'] must be ")
        assert str(caught.value).endswith(text)


def test_a_layer_in_place_of_its_weight() -> None:
    came = r"weight must be a float32 tensor \(V, D\); got Linear\(in_features=2, out_features=3, bias=True\)"
    for name, layer, end in (
        ("weight", torch.nn.Linear(2, 3), ": pass its .weight$"),
        ("hidden", torch.nn.Linear(2, 3), r"\)$"),
        ("weight", torch.nn.ReLU(), r"ReLU\(\)$"),
    ):
        with pytest.raises(TypeError, match=came + end if name == "weight" and layer.state_dict() else end):
            validate.tensor(name, layer, "(V, D)", None, (torch.float32,))


def test_entries_that_are_missing_are_not_looked_at() -> None:
    validate.saved({}, "x", "(2,)", (2,), validate.FLOATS)


def test_every_validator_is_tested() -> None:
    """They are the functions that take the name of what they look at first."""
    functions = {name: function for name, function in vars(validate).items() if inspect.isfunction(function)}
    validators = {
        name for name, function in functions.items() if next(iter(inspect.signature(function).parameters), "") == "name"
    }
    assert validators - {"fail", "values", "saved", "tensor"} == {name.partition(",")[0] for name in VALIDATORS}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0.5", "'0.5'"),
        (np.True_, "np.True_"),
        (np.float32(NAN), "np.float32(nan)"),
        (Decimal("0.5"), "Decimal('0.5')"),
        (torch.tensor(True), "a bool tensor of shape () on cpu"),
        (META, "a float32 tensor of shape () on meta"),
        (fp.RewardShift, "<class 'fused_pref.losses.reward_shift.RewardShift'>"),
        ("a\nb", r"'a\nb'"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
    ],
    ids=str,
)
def test_what_came_is_shown(value: Any, text: str) -> None:
    assert validate.describe(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 1000, HUGE, list(range(1000)), {"a" * 99: "b" * 99}, np.ones((99, 99)), {1} | {*"ab" * 99}]
)
def test_what_came_is_cut(value: Any) -> None:
    text = validate.describe(value)
    assert len(text) <= validate.LONGEST + 1
    assert "\n" not in text


def test_entries_are_looked_at_on_request() -> None:
    bad = torch.tensor([[0, NAN], [INF, 0]])
    validate.values("x", bad, torch.isfinite, "finite")
    assert refusal(ValueError, "x must be finite; got nan at [0, 1]", values, bad) == ""
    values(bad.nan_to_num())
    assert not validate.checking()


def test_malformed_values_are_not_remembered() -> None:
    """Good ones are; True is not 1, and what has no hash is handed on."""
    seen: list[Any] = []

    @validate.remembered("x")
    def double(keywords: Any) -> Any:
        seen.append(keywords["x"])
        return 2 * validate.integer("x", keywords["x"])

    assert [double({"x": 1, "y": object()}) for _ in range(3)] == [2, 2, 2]
    for bad in (True, [1], 1.0, True):
        with pytest.raises(TypeError, match="x must be an integer"):
            double({"x": bad})
    assert seen == [1, True, [1], 1.0, True]


@pytest.mark.parametrize("bad", [{"loss_weights": (1.0, True)}, {"label_smoothing": (0.0, False)}], ids=str)
def test_what_was_remembered_hides_no_bool_in_a_sequence(bad: dict[str, Any]) -> None:
    """(1.0, 1) equals (1.0, True), and is one key with it."""
    keywords = {**defaults(DPOKeywords), "loss_type": ("sigmoid", "sft")}
    good = {name: tuple(map(int, value)) for name, value in bad.items()}
    assert dpo_spec({**keywords, **good}) is dpo_spec({**keywords, **good})
    with pytest.raises(TypeError, match=r"got (True|False)"):
        dpo_spec({**keywords, **bad})
