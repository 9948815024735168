"""The error table: each bad call names the argument, what was expected and what came, and changes nothing."""

import inspect
from typing import Any

import pytest
import torch
from harness import make_batch, reference_logps

import fused_pref as fp

NAN, INF = float("nan"), float("inf")
BATCH = make_batch(4, 5, 11)
REF = reference_logps(4)
DESIRABLE = torch.tensor([True, False, True, False])
PACKED = (torch.randn(9, 11), torch.randint(0, 11, (9,)))

CPO = (BATCH.logits, BATCH.labels)
DPO = (*CPO, REF)
BCO = (*CPO, DESIRABLE, REF)
CALLS: dict[str, tuple[Any, ...]] = {
    "token_logps": CPO,
    "sequence_logps": CPO,
    "cpo_loss": CPO,
    "dpo_loss": DPO,
    "bco_loss": BCO,
}

# keyword, bad value, error, part of the message
SHARED = [
    ("ignore_index", 1.5, TypeError, "an integer; got 1.5"),
    ("ignore_index", True, TypeError, "an integer; got True"),
    ("shift", 1, TypeError, "True or False; got 1"),
    ("softcap", 0.0, ValueError, "> 0; got 0.0"),
    ("softcap", -3.0, ValueError, "> 0; got -3.0"),
    ("softcap", INF, ValueError, "got inf"),
    ("logit_scale", 0, ValueError, "other than 0; got 0"),
    ("logit_scale", NAN, ValueError, "got nan"),
    ("logit_scale", "1", TypeError, "got '1'"),
    ("temperature", 0.0, ValueError, "> 0; got 0.0"),
    ("temperature", -1.0, ValueError, "> 0; got -1.0"),
    ("temperature", None, TypeError, "got None"),
    ("backend", "cuda", ValueError, "'triton'"),
    ("backend", None, ValueError, "'triton'"),
    ("backend", 3, TypeError, "got 3"),
    ("logits_mean", "prompt", ValueError, "'completion'"),
    ("logits_mean", False, TypeError, "got False"),
    ("inplace_backward", None, TypeError, "True or False"),
]
PAIR = [
    ("beta", 0.0, ValueError, "> 0; got 0.0"),
    ("beta", -0.1, ValueError, "> 0; got -0.1"),
    ("beta", NAN, ValueError, "got nan"),
    ("beta", INF, ValueError, "got inf"),
    ("beta", "0.1", TypeError, "got '0.1'"),
    ("beta", True, TypeError, "got True"),
    ("loss_type", "sigmoids", ValueError, "'sigmoid'"),
    ("loss_type", None, ValueError, "'sigmoid'"),
    ("loss_type", 3, TypeError, "'sigmoid'"),
    ("label_smoothing", 1.0, ValueError, "[0, 1); got 1.0"),
    ("label_smoothing", -0.1, ValueError, "[0, 1); got -0.1"),
    ("label_smoothing", NAN, ValueError, "got nan"),
    ("pair_normalizer", 0, ValueError, "> 0; got 0"),
    ("pair_normalizer", torch.ones(1), ValueError, "0-d"),
    ("pair_normalizer", torch.tensor(-1.0), ValueError, "got -1.0"),
    ("pair_normalizer", torch.tensor(True), ValueError, "0-d"),
    ("token_normalizer", -1, ValueError, ">= 0; got -1"),
    ("token_normalizer", "4", TypeError, "got '4'"),
]
CPO_ONLY = [
    ("cpo_alpha", -1.0, ValueError, ">= 0; got -1.0"),
    ("cpo_alpha", NAN, ValueError, "got nan"),
    ("simpo_gamma", INF, ValueError, "got inf"),
    ("alpha", NAN, ValueError, "got nan"),
    ("alpha", None, TypeError, "got None"),
    ("nll_reduction", "mean", ValueError, "'token'"),
]
BCO_ONLY = [
    ("beta", 0.0, ValueError, "> 0; got 0.0"),
    ("beta", NAN, ValueError, "got nan"),
    ("delta", NAN, ValueError, "got nan"),
    ("delta", "0", TypeError, "RewardShift"),
    ("delta", torch.zeros(4), ValueError, "0-d"),
    ("delta", torch.tensor(1), ValueError, "floating"),
    ("sample_weight", torch.ones(3), ValueError, "(S,) = (4,)"),
    ("sample_weight", torch.ones(4, dtype=torch.int64), TypeError, "(S,)"),
    ("sample_weight", [1.0] * 4, TypeError, "tensor"),
    ("reduction", "sum", ValueError, "'class_mean'"),
    ("sequence_normalizer", 0, ValueError, "> 0; got 0"),
    ("class_normalizer", (1, 2), ValueError, 'reduction="class_mean"'),
]


def raises(error: type[Exception], name: str, text: str, function: Any, *args: Any, **keywords: Any) -> None:
    with pytest.raises(error) as caught:
        function(*args, **keywords)
    assert name in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(("keyword", "value", "error", "text"), SHARED, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("function", CALLS)
def test_shared_keywords(function: str, keyword: str, value: Any, error: type[Exception], text: str) -> None:
    raises(error, keyword, text, getattr(fp, function), *CALLS[function], **{keyword: value})


def objective_rows() -> list[Any]:
    tables = {"cpo_loss": PAIR + CPO_ONLY, "dpo_loss": PAIR, "bco_loss": BCO_ONLY}
    return [(function, *row) for function, rows in tables.items() for row in rows]


@pytest.mark.parametrize(("function", "keyword", "value", "error", "text"), objective_rows(), ids=lambda x: str(x)[:20])
def test_objective_keywords(function: str, keyword: str, value: Any, error: type[Exception], text: str) -> None:
    raises(error, keyword, text, getattr(fp, function), *CALLS[function], **{keyword: value})


MODULES = {"cpo_loss": fp.CPOLoss, "dpo_loss": fp.DPOLoss, "bco_loss": fp.BCOLoss}


@pytest.mark.parametrize(
    ("function", "keyword", "value", "error", "text"),
    [("cpo_loss", *row) for row in PAIR[:3] + PAIR[6:7] + CPO_ONLY]
    + [("dpo_loss", *row) for row in PAIR[:3] + SHARED[3:5]]
    + [("bco_loss", *row) for row in BCO_ONLY[:2] + SHARED[9:10]],
    ids=lambda x: str(x)[:20],
)
def test_modules_refuse_at_construction(
    function: str, keyword: str, value: Any, error: type[Exception], text: str
) -> None:
    raises(error, keyword, text, MODULES[function], **{keyword: value})


TENSORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str, str]] = [
    ("cpo_loss", (BATCH.logits[0], BATCH.labels[0]), {}, ValueError, "logits", "(S, T, V)"),
    ("cpo_loss", (BATCH.logits.long(), BATCH.labels), {}, TypeError, "logits", "int64"),
    ("cpo_loss", (BATCH.logits.to(torch.complex64), BATCH.labels), {}, TypeError, "logits", "complex64"),
    ("cpo_loss", (BATCH.logits.tolist(), BATCH.labels), {}, TypeError, "logits", "tensor"),
    ("cpo_loss", (BATCH.logits[..., :0], BATCH.labels), {}, ValueError, "logits", "V >= 1"),
    ("cpo_loss", (BATCH.logits.to_sparse(), BATCH.labels), {}, TypeError, "logits", "dense"),
    ("cpo_loss", (BATCH.logits.to("meta"), BATCH.labels), {}, ValueError, "logits", "meta"),
    ("cpo_loss", (BATCH.logits, BATCH.labels.float()), {}, TypeError, "labels", "float32"),
    ("cpo_loss", (BATCH.logits, BATCH.labels.bool()), {}, TypeError, "labels", "bool"),
    ("cpo_loss", (BATCH.logits, BATCH.labels[:, 1:]), {}, ValueError, "labels", "(S, T) = (4, 5)"),
    ("cpo_loss", (BATCH.logits, BATCH.labels.to("meta")), {}, ValueError, "labels", "meta"),
    ("cpo_loss", (BATCH.logits[:3], BATCH.labels[:3]), {}, ValueError, "labels", "S = 3"),
    ("dpo_loss", (BATCH.logits[:3], BATCH.labels[:3], REF[:3]), {}, ValueError, "labels", "S = 3"),
    ("dpo_loss", (*CPO, REF[:2]), {}, ValueError, "ref_logps", "(S,) = (4,)"),
    ("dpo_loss", (*CPO, REF[:, None]), {}, ValueError, "ref_logps", "(4, 1)"),
    ("dpo_loss", (*CPO, REF.long()), {}, TypeError, "ref_logps", "int64"),
    ("dpo_loss", (*CPO, None), {}, TypeError, "ref_logps", "None"),
    ("bco_loss", (*CPO, DESIRABLE.long(), REF), {}, TypeError, "desirable", "bool"),
    ("bco_loss", (*CPO, DESIRABLE.tolist(), REF), {}, TypeError, "desirable", "tensor"),
    ("bco_loss", (*CPO, DESIRABLE[:3], REF), {}, ValueError, "desirable", "(S,) = (4,)"),
    ("bco_loss", (*CPO, DESIRABLE, REF[:3]), {}, ValueError, "ref_logps", "(S,) = (4,)"),
    ("bco_loss", BCO, {"reduction": "class_mean", "class_normalizer": 3}, TypeError, "class_normalizer", "pair"),
    ("bco_loss", BCO, {"reduction": "class_mean", "class_normalizer": (1, -2)}, ValueError, "class_normalizer", "-2"),
    (
        "bco_loss",
        BCO,
        {"reduction": "class_mean", "class_normalizer": (1, None)},
        TypeError,
        "class_normalizer",
        "pair",
    ),
    ("bco_loss", BCO, {"reduction": "class_mean", "sequence_normalizer": 3}, ValueError, "sequence_normalizer", "mean"),
    ("sequence_logps", CPO, {"average": 1}, TypeError, "average", "True or False"),
    ("cpo_loss", PACKED, {"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens", "tensor"),
    ("cpo_loss", CPO, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "logits", "(N_total, V)"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([0, 5, 4, 9, 9])}, ValueError, "cu_seqlens", "never fall"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([0, 5, 8])}, ValueError, "cu_seqlens", "N_total = 9"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([0, 5, 12])}, ValueError, "cu_seqlens", "N_total = 9"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([1, 5, 9])}, ValueError, "cu_seqlens", "start at 0"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens", "S = 1"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([0.0, 5.0, 9.0])}, TypeError, "cu_seqlens", "float32"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([[0, 5, 9]])}, ValueError, "cu_seqlens", "(S+1,)"),
    ("cpo_loss", PACKED, {"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, "cu_seqlens", "(S+1,)"),
    (
        "cpo_loss",
        (BATCH.logits[:1].expand(4, 5, 11), BATCH.labels),
        {"inplace_backward": True},
        ValueError,
        "logits",
        "expanded",
    ),
]


@pytest.mark.parametrize(("function", "args", "keywords", "error", "name", "text"), TENSORS, ids=range(len(TENSORS)))
def test_tensors(
    function: str, args: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], name: str, text: str
) -> None:
    raises(error, name, text, getattr(fp, function), *args, **keywords)


@pytest.mark.parametrize("function", CALLS)
def test_unknown_keywords(function: str) -> None:
    raises(TypeError, "betta", function, getattr(fp, function), *CALLS[function], betta=0.1)
    with pytest.raises(TypeError):
        getattr(fp, function)(*CALLS[function], 0.1)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"kind": "mean"}, ValueError, "'running_mean'"),
        ({"kind": None}, ValueError, "'running_mean'"),
        ({"kind": "ema", "decay": 1.0}, ValueError, "decay must be a number in [0, 1); got 1.0"),
        ({"kind": "ema", "decay": -0.1}, ValueError, "decay"),
        ({"kind": "ema", "decay": NAN}, ValueError, "decay"),
        ({"kind": "fixed", "value": INF}, ValueError, "value"),
        ({"update": "epoch"}, ValueError, "'step'"),
        ({"process_group": "world"}, TypeError, "process_group"),
        ({"dekay": 0.9}, TypeError, "dekay"),
    ],
)
def test_reward_shift(keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    raises(error, "", text, fp.RewardShift, **keywords)


def test_failed_call_changes_nothing() -> None:
    shift = fp.RewardShift()
    fp.bco_loss(*BCO, delta=shift)
    before = {name: value.clone() for name, value in shift.state_dict().items()}
    inputs = [value.clone() for value in BCO]
    for bad in ({"beta": 0.0}, {"sample_weight": torch.ones(3)}, {"temperature": 0.0}, {"class_normalizer": (1, 2)}):
        with pytest.raises(ValueError, match=r"must be|needs"):
            fp.bco_loss(*BCO, delta=shift, **bad)
    assert all(torch.equal(value, before[name]) for name, value in shift.state_dict().items())
    assert all(torch.equal(value, copy) for value, copy in zip(BCO, inputs, strict=True))


def test_device_values_are_checked_on_request() -> None:
    with fp.checks():
        raises(ValueError, "ref_logps", "finite; got nan at [1]", fp.dpo_loss, *CPO, torch.tensor([0, NAN, 0, 0]))
        weights = torch.tensor([1.0, 1.0, -2.0, 1.0])
        raises(ValueError, "sample_weight", ">= 0; got -2.0 at [2]", fp.bco_loss, *BCO, sample_weight=weights)
    assert fp.dpo_loss(*CPO, torch.tensor([0, NAN, 0, 0])).loss.isnan()


def test_checks_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = BATCH.labels.clone()
    labels[0, 2] = 11
    monkeypatch.setenv("FUSED_PREF_CHECKS", "1")
    raises(ValueError, "labels", "got 11 at [0, 2]", fp.cpo_loss, BATCH.logits, labels)
    monkeypatch.setenv("FUSED_PREF_CHECKS", "0")
    assert fp.cpo_loss(BATCH.logits, labels).loss.isnan()


def test_triton_backend_refuses_float64() -> None:
    raises(TypeError, "float64", 'backend="torch"', fp.cpo_loss, BATCH.logits.double(), BATCH.labels, backend="triton")


def test_signatures_agree() -> None:
    """Function, reference and module show the same keywords with the same defaults."""
    for name in CALLS:
        assert inspect.signature(getattr(fp, name)) == inspect.signature(getattr(fp.reference, name)), name
    for name, module in MODULES.items():
        parameters = inspect.signature(getattr(fp, name)).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert keywords == list(inspect.signature(module).parameters.values())
        assert all(f"\n    {p.name} (default" in (getattr(fp, name).__doc__ or "") for p in keywords)
