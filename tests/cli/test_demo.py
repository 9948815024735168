"""The demo as it is run: its options, its output, its exit status."""

import importlib
import json
import logging
import socket
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from trl_models import tokenizer as small_tokenizer

from fused_pref.__main__ import main
from fused_pref.cli.demo import command as cli
from fused_pref.cli.demo.history import Check, History, Point
from fused_pref.cli.demo.objectives import OBJECTIVES
from fused_pref.cli.demo.quiet import quiet
from fused_pref.cli.demo.report import check_line, peak_memory, point_line
from fused_pref.cli.doctor import LINEAR_BOUNDS

CPU = torch.device("cpu")


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, but for the size."""
    monkeypatch.setattr("fused_pref.cli.demo.texts.load_tokenizer", small_tokenizer)


def mini(path: Path) -> Path:
    records = ({"prompt": f"Say {i}:", "chosen": f"yes {i}", "rejected": f"no no {i}"} for i in range(8))
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A user's settings, with which libraries draw bars and send telemetry. What tries the network is listed."""
    attempts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        attempts.append(str(args))
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    bars = importlib.import_module("datasets.utils.tqdm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(bars, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    monkeypatch.delenv("CI", raising=False)
    return attempts


@pytest.mark.slow
@pytest.mark.usefixtures("small_vocabulary")
def test_demo_runs_end_to_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    user: list[str],
) -> None:
    data, out, folder = mini(tmp_path / "mine.jsonl"), tmp_path / "made" / "here", tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert main(["demo", "--steps", "2", "--data", str(data), "--out", str(out), "--seed", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert caplog.records == []
    assert user == []
    assert "\x1b" not in captured.out
    assert "\n\n" not in captured.out
    for part in (
        f"data: 8 pairs from {data}, 6 to train on, 2 held out",
        "plan: 2 steps of up to 8 pairs, at most 240 s in all",
        "CPO from random weights (seed 5)",
        "DPO from random weights (seed 5)",
        "BCO from random weights (seed 5)",
        "the higher log-prob per token",
        "CPO reward: beta x summed log-prob",
        "DPO reward: beta x (summed log-prob - that of the frozen copy)",
        "BCO reward: beta x (summed log-prob - that of the frozen copy)",
        f"curves: {out / 'curves.png'}",
    ):
        assert part in captured.out
    assert captured.out.count("against fused_pref.reference in float64, 2 sequences: loss off by") == 3
    assert captured.out.count(": ok\n") == 3
    for step in range(3):
        assert captured.out.count(f"  step   {step}: ") == 3
    for measure in (" accuracy ", " reward accuracy ", " reward margin "):
        assert sum(measure in line and "│" not in line for line in captured.out.splitlines()) >= 3
    assert "was stopped" not in captured.out
    assert "{" not in captured.out
    png = (out / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000
    assert [path.name for path in out.iterdir()] == ["curves.png"]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_demo_reads_its_own_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, user: list[str]
) -> None:
    """As large as it is, and without a word or the network."""
    data = mini(tmp_path / "mine.jsonl")
    arguments = ["--objective", "dpo", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(["demo", *arguments, "--data", str(data)]) == 0
    captured = capsys.readouterr()
    assert (captured.err, caplog.records, user) == ("", [], [])
    assert "vocabulary 131,072" in captured.out
    assert captured.out.count(": ok\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("small_vocabulary")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_demo_stops_at_the_cap_and_says_so(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--objective", name, "--cap", "0.01", "--steps", "30", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert f"{name.upper()} was stopped after 1 of 30 steps by the wall-clock cap." in out
    assert not any(other.upper() in out for other in OBJECTIVES if other != name)


@pytest.mark.slow
@pytest.mark.usefixtures("small_vocabulary")
def test_a_failed_check_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LINEAR_BOUNDS, torch.bfloat16, (2e-2, 0.0))
    arguments = ["--objective", "cpo", "--steps", "1", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 1
    assert ": BAD\n" in capsys.readouterr().out


@pytest.mark.usefixtures("user")
def test_libraries_are_loud_again_afterwards() -> None:
    def settings() -> tuple[bool, bool, bool]:
        logs = logging.getLogger("trl").isEnabledFor(logging.WARNING)
        return datasets.are_progress_bars_disabled(), constants.is_offline_mode(), logs

    inside = []

    def fail() -> None:
        with quiet():
            inside.append(settings())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [(True, True, False)]
    assert settings() == (False, False, True)


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mini(tmp_path / "mine.jsonl")
    assert main(["demo", "--data", str(path), "--out", str(path / "below")]) == 2
    assert f"argument --out: cannot write to the folder {path / 'below'}: Not a directory" in capsys.readouterr().err


def test_missing_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "EXTRAS", ("rich", "no_such_package"))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    expected = 'fused_pref: the demo needs no-such-package: pip install "fused-pref[demo]"\n'
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()


def test_extras_are_those_of_the_project() -> None:
    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
    (line,) = (line for line in project.splitlines() if line.startswith("demo = "))
    for name in cli.EXTRAS:
        assert f'"{name.replace("_", "-")}>=' in line
    assert line.count('"') == 2 * len(cli.EXTRAS)


@pytest.mark.slow
@pytest.mark.usefixtures("small_vocabulary")
def test_large_held_out_sets_and_long_texts_are_cut_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "MAX_HELDOUT", 1)
    monkeypatch.setattr("fused_pref.cli.demo.texts.MAX_COMPLETION", 2)
    arguments = ["--objective", "cpo", "--steps", "1", "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--data", str(mini(tmp_path / "mine.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert "measured on the first 1 held-out pairs\n" in out
    assert "7 records were cut to 128 tokens of prompt and 2 of completion\n" in out


def test_console_lines() -> None:
    history = History(OBJECTIVES["cpo"], 2)
    assert point_line(history, Point(0, 0.25, 0.5, -1e-9)) == "  step   0: held-out accuracy 25%, reward margin +0.000"
    history.losses += [3.0, 2.0]
    line = "  step   2: loss 2.000, held-out accuracy 25%, reward margin +1.000"
    assert point_line(history, Point(2, 0.25, 0.5, 1.0)) == line
    line = check_line(Check(1e-7, 2e-7))
    assert line.endswith("loss off by 1.0e-07 (at most 2e-05), gradient by 2.0e-07 (at most 1e-04): ok")
    line = check_line(Check(1e-3, 1e-2, torch.bfloat16))
    assert "first step in bfloat16 against" in line
    assert line.endswith("loss off by 1.0e-03 (at most 2e-02), gradient by 1.0e-02 (at most 2e-02): ok")
    assert check_line(Check(1e-3, 3e-2, torch.bfloat16)).endswith(": BAD")


def test_spare_core_gives_the_threads_back() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with cli.spare_core():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_peak_memory_is_plausible() -> None:
    number, rest = peak_memory(CPU).split(" ", 1)
    assert rest == "MiB resident in the process"
    assert 100 < int(number.replace(",", "")) < 100_000
