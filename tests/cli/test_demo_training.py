"""The demo: its rows and batches, its training, and the check of the first step."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_models import tokenizer as small_tokenizer

import fused_pref as fp
from fused_pref.cli.demo.history import Check, History
from fused_pref.cli.demo.objectives import OBJECTIVES, build
from fused_pref.cli.demo.quiet import quiet
from fused_pref.cli.demo.records import Record
from fused_pref.cli.demo.report import make_console, make_progress
from fused_pref.cli.demo.texts import MAX_COMPLETION, load_tokenizer, make_batch, make_rows
from fused_pref.cli.demo.train import BETA, Watcher, check_step, train
from fused_pref.models import Preference

# w12 marks what is rejected, on held-out prompts too.
ROWS = [{"prompt": f"w{i % 4}", "chosen": " w10 w11", "rejected": " w10 w12 w12"} for i in range(8)]
HELDOUT = [{"prompt": f"w{20 + i} w1", "chosen": " w10 w11", "rejected": " w10 w12"} for i in range(3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where cores are shared, threads that wait for each other make these small products slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Rows and batches.


@pytest.mark.slow
def test_rows_set_off_completions_and_cut_long_texts() -> None:
    tokenizer = load_tokenizer()
    assert len(tokenizer) == 131_072
    records = [Record("Dutch:", "ja", " nee", None), Record(" b" * 500 + " z:", " c" * 500, "d", None)]
    (row, long), cut = make_rows(records, tokenizer)
    assert row == {"prompt": "Dutch:", "chosen": " ja", "rejected": " nee"}
    assert cut == 1
    assert long == {"prompt": " b" * 126 + " z:", "chosen": " c" * MAX_COMPLETION, "rejected": " d"}
    batch = make_batch([row], tokenizer)
    assert batch["input_ids"][0].tolist() == [*tokenizer.encode("Dutch: ja"), tokenizer.pad_token_id]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]
    assert batch["input_ids"][0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(batch["labels"][1, 4:]) == " nee"


def test_batch_scores_the_completions() -> None:
    tokenizer = small_tokenizer()
    batch = make_batch([*ROWS[:1], *HELDOUT[:1]], tokenizer)
    seen, scored = batch["attention_mask"] == 1, batch["labels"] != -100
    texts = ["w0 w10 w11", "w20 w1 w10 w11", "w0 w10 w12 w12", "w20 w1 w10 w12"]
    assert [tokenizer.decode(row[mask]) for row, mask in zip(batch["input_ids"], seen, strict=True)] == texts
    assert seen.tolist()[0] == [True, True, True, False]
    completions = ["w10 w11", "w10 w11", "w10 w12 w12", "w10 w12"]
    assert [tokenizer.decode(row[mask]) for row, mask in zip(batch["labels"], scored, strict=True)] == completions
    assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])


def test_model_depends_on_its_seed_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (build(16, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# Training.


def run_training(name: str, steps: int, deadline: float = math.inf, model: Any = None) -> History:
    """Nothing is printed: no bar, no line of a trainer."""
    tokenizer = small_tokenizer()
    progress = make_progress(make_console(), name, steps)
    watcher = Watcher(OBJECTIVES[name], steps, make_batch(HELDOUT, tokenizer), deadline, progress)
    with quiet():
        return train(model or build(len(tokenizer), 0), tokenizer, ROWS, 0, watcher)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_learns_the_preference(name: str) -> None:
    model = build(66, 0)
    start = copy.deepcopy(model)
    history = run_training(name, 20, model=model)
    first, last = history.points[0], history.points[-1]
    assert (last.accuracy, last.reward_accuracy) == (1.0, 1.0)
    assert first.margin < 0.1 < last.margin
    assert [point.step for point in history.points] == [0, 4, 8, 12, 16, 20]
    assert len(history.losses) == 20
    assert history.losses[-1] < history.losses[0]
    assert not history.stopped
    assert history.check is not None
    assert history.check.holds
    assert history.check.dtype == torch.bfloat16
    batch = make_batch(HELDOUT, small_tokenizer())
    rewards = BETA * (_logps(model, batch) - (_logps(start, batch) if name != "cpo" else 0))
    assert last.margin == pytest.approx((rewards[:3] - rewards[3:]).mean().item(), rel=2e-2)


def test_accuracy_is_by_log_prob_per_token() -> None:
    """By the sums, every shorter completion would be the better one."""
    model = build(66, 0)
    rows = [{"prompt": f"w{i}", "chosen": " w1 w2 w3", "rejected": f" w{i + 20}"} for i in range(12)]
    batch = make_batch(rows, small_tokenizer())
    chosen, rejected = _logps(model, batch).view(2, -1)
    assert (chosen < rejected).all()
    expected = (chosen / 3 > rejected).double().mean().item()
    assert 0 < expected < 1
    watcher = Watcher(OBJECTIVES["cpo"], 1, batch, math.inf, make_progress(make_console(), "CPO", 1))
    watcher.evaluate(model)
    (point,) = watcher.history.points
    assert (point.accuracy, point.reward_accuracy) == (expected, 0.0)


@torch.no_grad()
def _logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return fp.reference.sequence_logps(logits, batch["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "bco"])
def test_rewards_of_a_reference_start_from_ties(name: str) -> None:
    first = run_training(name, 1).points[0]
    assert (first.reward_accuracy, first.margin) == (0.5, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_stops_at_the_deadline(name: str) -> None:
    history = run_training(name, 50, deadline=time.monotonic() - 1)
    assert history.stopped
    assert len(history.losses) == 1
    assert [point.step for point in history.points] == [0, 1]


@pytest.mark.slow
def test_training_ends_before_a_deadline_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves on by 1 s whenever it is read, some steps fit, not all."""
    clock = itertools.count()
    monkeypatch.setattr("fused_pref.cli.demo.train.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    history = run_training("cpo", 50, deadline=30.0)
    assert 3 <= len(history.losses) < 15
    assert history.points[-1].step == len(history.losses)


# The check of the first step.


def forward_inputs(loss: Callable[..., Any], *others: torch.Tensor, **keywords: Any) -> dict[str, Any]:
    batch = make_batch(ROWS[:3], small_tokenizer())
    return {**batch, "preference": Preference(loss, (batch["labels"], *others), {"beta": BETA, **keywords})}


def bco_inputs(shift: fp.RewardShift) -> dict[str, Any]:
    return forward_inputs(fp.linear_bco_loss, torch.arange(6) < 3, torch.full((6,), -9.0), delta=shift)


def test_check_sees_a_wrong_loss() -> None:
    model = build(66, 0)

    def linear_cpo_loss(*tensors: Any, **keywords: Any) -> Any:
        return fp.linear_cpo_loss(*tensors, **{**keywords, "cpo_alpha": 1.001})

    assert check_step(model, forward_inputs(fp.linear_cpo_loss)).holds
    assert check_step(model, bco_inputs(fp.RewardShift("ema"))).holds
    check = check_step(model, forward_inputs(linear_cpo_loss))
    assert not check.holds
    assert check.loss_error > 1e-4
    assert check.gradient_error > 1e-4
    assert not Check(1e-3, 0.0).holds
    assert not Check(0.0, 1e-3).holds


def test_check_sees_a_wrong_gradient_of_the_right_loss() -> None:
    """It is a thousandth too large."""

    def linear_cpo_loss(hidden: torch.Tensor, *tensors: torch.Tensor, **keywords: Any) -> Any:
        return fp.linear_cpo_loss(hidden * 1.001 - hidden.detach() * 0.001, *tensors, **keywords)

    check = check_step(build(66, 0), forward_inputs(linear_cpo_loss))
    assert check.loss_error < 1e-5
    assert check.gradient_error == pytest.approx(1e-3, rel=0.01)
    assert not check.holds


def test_check_leaves_the_shift_alone() -> None:
    shift = fp.RewardShift("ema")
    inputs = bco_inputs(shift)
    check_step(build(66, 0), inputs)
    assert shift.count.tolist() == [0, 0]
    preference = inputs["preference"]
    preference.loss(torch.randn(6, 4, 8), torch.randn(66, 8), *preference.tensors, **preference.keywords)
    assert shift.count.tolist() == [3, 3]
