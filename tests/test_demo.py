"""The demo: its batches, its training and the whole run."""

import itertools
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import IGNORE

import fused_pref as fp
from fused_pref.__main__ import main
from fused_pref.demo import cli
from fused_pref.demo.batches import MAX_COMPLETION, Pair, in_order, load_tokenizer, make_batch, shuffled, tokenize
from fused_pref.demo.model import build, hidden_states
from fused_pref.demo.objectives import BCO, CPO, OBJECTIVES
from fused_pref.demo.records import Record
from fused_pref.demo.report import Watcher, make_console, peak_memory, point_line
from fused_pref.demo.train import Check, History, Point, check_step, evaluate, train

CPU = torch.device("cpu")
PAIRS = [Pair([1, 5, 6], [7, 8, 2], [9, 2]), Pair([1, 5], [8, 2], [9, 9, 7, 2]), Pair([1, 6, 5, 5], [7, 2], [9, 7, 2])]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several test processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def mini(path: Path) -> Path:
    records = ({"prompt": f"Say {i}:", "chosen": f"yes {i}", "rejected": f"no no {i}"} for i in range(8))
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Batches.


def test_tokenize_sets_off_completions_and_cuts_long_ones() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.n_words == 131_072
    records = [Record("Dutch:", "ja", " nee", None), Record(" b" * 500 + " z:", " c" * 500, "d", None)]
    (pair, long), cut = tokenize(records, tokenizer)
    assert tokenizer.decode(pair.prompt + pair.chosen) == "Dutch: ja"
    assert tokenizer.decode(pair.prompt + pair.rejected) == "Dutch: nee"
    assert pair.prompt[0] == tokenizer.bos_id
    assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_id
    assert cut == 1
    assert len(long.chosen) == MAX_COMPLETION
    assert tokenizer.decode(long.prompt).endswith(" b z:")


def test_batch_scores_the_completions() -> None:
    batch = make_batch(PAIRS, CPU)
    completions = [pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS]
    assert batch.labels.tolist() == list(itertools.chain(*completions))
    assert batch.lengths.tolist() == [len(completion) for completion in completions]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, completions))]
    assert batch.cu_seqlens.dtype == torch.int32
    first = batch.first(2)
    assert first.labels.tolist() == make_batch(PAIRS[:2], CPU).labels.tolist()


def test_packed_hidden_states_are_those_of_the_padded_model() -> None:
    model, batch = build(16, 0, CPU), make_batch(PAIRS, CPU)
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels[:, 1:][batch.scored[:, :-1]] = batch.labels
    logits = model.lm_head(hidden_states(model, batch))
    packed = fp.sequence_logps(logits, batch.labels, shift=False, cu_seqlens=batch.cu_seqlens)
    torch.testing.assert_close(packed, fp.sequence_logps(model(batch.input_ids).logits, labels))
    alone = make_batch(PAIRS[:1], CPU)
    torch.testing.assert_close(hidden_states(model, alone)[0], hidden_states(model, batch)[0])


def test_batches_cover_all_pairs() -> None:
    assert sum(len(batch.input_ids) for batch in in_order(PAIRS, 2, CPU)) == 2 * len(PAIRS)
    many = [Pair([1, i], [i, 2], [2]) for i in range(3, 15)]
    batches = list(itertools.islice(shuffled(many, 4, 0, CPU), 6))
    seen = [batch.input_ids[:4, 1].tolist() for batch in batches]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(3, 15))
    assert seen[:3] != seen[3:]
    again = next(shuffled(many, 4, 0, CPU))
    assert again.input_ids[:4, 1].tolist() == seen[0]
    assert len(next(shuffled(PAIRS, 8, 0, CPU)).input_ids) == 2 * len(PAIRS)


def test_model_depends_on_its_seed_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (build(16, seed, CPU).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# Training.


def run_training(name: str, steps: int, deadline: float = math.inf, vocabulary: int = 16) -> History:
    """Token 9 marks what is rejected, on held-out prompts too."""
    model = build(vocabulary, 0, CPU)
    pairs = [Pair([1, 3 + i % 4], [7, 8, 2], [7, 9, 2]) for i in range(8)]
    heldout = in_order([Pair([1, 10 + i], [7, 8, 2], [7, 9, 2]) for i in range(3)], 2, CPU)
    return train(model, OBJECTIVES[name](model), shuffled(pairs, 4, 0, CPU), heldout, steps, deadline, lambda _: None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_learns_the_preference(name: str) -> None:
    history = run_training(name, 20)
    first, last = history.points[0], history.points[-1]
    assert (last.accuracy, last.reward_accuracy) == (1.0, 1.0)
    assert first.margin < 0.1 < last.margin
    assert [point.step for point in history.points] == [0, 4, 8, 12, 16, 20]
    assert len(history.losses) == 20
    assert history.losses[-1] < history.losses[0]
    assert not history.stopped
    assert history.check is not None
    assert history.check.holds


def test_bco_starts_from_ties() -> None:
    first = run_training("bco", 1).points[0]
    assert first.reward_accuracy == 0.5
    assert abs(first.margin) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_stops_at_the_deadline(name: str) -> None:
    history = run_training(name, 50, deadline=time.monotonic() - 1)
    assert history.stopped
    assert len(history.losses) == 1
    assert [point.step for point in history.points] == [0, 1]


def test_training_ends_before_a_deadline_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves on by 1 s whenever it is read, some steps fit, not all."""
    clock = itertools.count()
    monkeypatch.setattr("fused_pref.demo.train.time.monotonic", lambda: float(next(clock)))
    history = run_training("cpo", 50, deadline=30.0)
    assert 3 <= len(history.losses) < 15
    assert history.points[-1].step == len(history.losses)


def test_check_sees_a_wrong_loss_and_gradient() -> None:
    model, batch = build(16, 0, CPU), make_batch(PAIRS, CPU)
    for objective in (CPO(model), BCO(model)):
        assert check_step(model, objective, batch).holds
    wrong = CPO(model)
    wrong.loss = fp.CPOLoss(beta=0.1, cpo_alpha=1.001, shift=False, logits_mean=None)
    wrong.keywords = lambda: CPO(model).loss.keywords  # type: ignore[method-assign]
    check = check_step(model, wrong, batch)
    assert not check.holds
    assert check.loss_error > 1e-4
    assert check.gradient_error > 1e-4
    assert not Check(1e-3, 0.0).holds
    assert not Check(0.0, 1e-3).holds


def test_check_and_evaluation_leave_the_shift_alone() -> None:
    model, batch = build(16, 0, CPU), make_batch(PAIRS, CPU)
    objective = BCO(model)
    check_step(model, objective, batch)
    evaluate(model, objective, [batch], [objective.inputs(batch)], 0)
    assert objective.shift.count.tolist() == [0, 0]
    objective.loss(model.lm_head(hidden_states(model, batch)), *objective.inputs(batch), cu_seqlens=batch.cu_seqlens)
    assert objective.shift.count.tolist() == [3, 3]


def test_frozen_copy_does_not_follow_the_model() -> None:
    model, batch = build(16, 0, CPU), make_batch(PAIRS, CPU)
    objective = BCO(model)
    before = objective.inputs(batch)[2]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    assert torch.equal(objective.inputs(batch)[2], before)
    assert not before.requires_grad


# The whole run.


def test_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_network: None) -> None:
    out = tmp_path / "made" / "here"
    arguments = ["--steps", "2", "--data", str(mini(tmp_path / "mine.jsonl")), "--out", str(out), "--seed", "5"]
    assert main(["demo", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert "\n\n" not in captured.out
    for part in (
        f"data: 8 pairs from {tmp_path / 'mine.jsonl'}, 6 to train on, 2 held out",
        "vocabulary 131,072",
        "plan: 2 steps of up to 8 pairs, at most 240 s in all",
        "CPO from random weights (seed 5)",
        "BCO from random weights (seed 5)",
        "the higher log-prob per token",
        "CPO reward: beta x summed log-prob",
        "BCO reward: beta x (summed log-prob - that of the frozen copy)",
        f"curves: {out / 'curves.png'}",
    ):
        assert part in captured.out
    assert captured.out.count("against fused_pref.reference in float64, 2 sequences: loss off by") == 2
    assert captured.out.count(": ok\n") == 2
    for step in range(3):
        assert captured.out.count(f"  step   {step}: ") == 2
    for measure in (" accuracy ", " reward accuracy ", " reward margin "):
        assert sum(measure in line and "│" not in line for line in captured.out.splitlines()) >= 2
    assert "was stopped" not in captured.out
    png = (out / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000


@pytest.mark.parametrize("name", OBJECTIVES)
def test_demo_stops_at_the_cap_and_says_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--objective", name, "--cap", "0.01", "--steps", "30", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert f"{name.upper()} was stopped after 1 of 30 steps by the wall-clock cap." in out
    other = {"cpo": "BCO", "bco": "CPO"}[name]
    assert other not in out


def test_a_failed_check_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fused_pref.demo.train.GRADIENT_BOUND", 0.0)
    arguments = ["--objective", "cpo", "--steps", "1", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 1
    assert ": BAD\n" in capsys.readouterr().out


# option, value, part of the message
OPTIONS = [
    ("--objective", "dpo", "invalid choice: 'dpo'"),
    ("--steps", "0", "argument --steps: must be an integer >= 1; got '0'"),
    ("--steps", "-3", "argument --steps: "),
    ("--steps", "2.5", "argument --steps: must be an integer >= 1; got '2.5'"),
    ("--steps", "many", "got 'many'"),
    ("--seed", "-1", "argument --seed: "),
    ("--seed", "x", "argument --seed: must be an integer in [0, 2**32); got 'x'"),
    ("--seed", str(2**32), "argument --seed: "),
    ("--cap", "0", "argument --cap: must be a finite number > 0; got '0'"),
    ("--cap", "inf", "argument --cap: must be a finite number > 0; got 'inf'"),
    ("--cap", "nan", "argument --cap: must be a finite number > 0; got 'nan'"),
    ("--cap", "soon", "got 'soon'"),
    ("--colour", "red", "unrecognized arguments: --colour red"),
]


@pytest.mark.parametrize(("option", "value", "message"), OPTIONS)
def test_bad_option(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", option, value]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused_pref: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mini(tmp_path / "mine.jsonl")
    assert main(["demo", "--data", str(path), "--out", str(path / "below")]) == 2
    assert f"argument --out: cannot make the folder {path / 'below'}: Not a directory" in capsys.readouterr().err


def test_missing_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "EXTRAS", ("rich", "no_such_package"))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    expected = 'fused_pref: the demo needs no-such-package: pip install "fused-pref[demo]"\n'
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()


def test_extras_are_those_of_the_project() -> None:
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    (line,) = (line for line in project.splitlines() if line.startswith("demo = "))
    for name in cli.EXTRAS:
        assert f'"{name.replace("_", "-")}>=' in line
    assert line.count('"') == 2 * len(cli.EXTRAS)


def test_large_held_out_sets_and_long_texts_are_cut_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "MAX_HELDOUT", 1)
    monkeypatch.setattr("fused_pref.demo.batches.MAX_COMPLETION", 2)
    arguments = ["--objective", "cpo", "--steps", "1", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert "measured on the first 1 held-out pairs\n" in out
    assert "7 records were cut to 128 tokens of prompt and 2 of completion\n" in out


def test_console_lines(capsys: pytest.CaptureFixture[str]) -> None:
    history = History(CPO(build(16, 0, CPU)), 2)
    assert point_line(history, Point(0, 0.25, 0.5, -1e-9)) == "  step   0: held-out accuracy 25%, reward margin +0.000"
    history.check = Check(1e-7, 2e-7)
    with Watcher(make_console(), "CPO", 2) as watcher:
        for loss in (3.0, 2.0):
            history.losses.append(loss)
            watcher(history)
        history.points.append(Point(2, 0.25, 0.5, 1.0))
        watcher(history)
        watcher(history)
    out = capsys.readouterr().out
    assert out.count("first step against") == 1
    assert out.count("  step   2: loss 2.000, held-out accuracy 25%, reward margin +1.000\n") == 1


def test_spare_core_gives_the_threads_back() -> None:
    torch.set_num_threads(3)
    with cli.spare_core():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 3


def test_peak_memory_is_plausible() -> None:
    number, rest = peak_memory(CPU).split(" ", 1)
    assert rest == "MiB resident in the process"
    assert 100 < int(number.replace(",", "")) < 100_000
