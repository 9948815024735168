"""``python -m fused_pref tune``: figures of this machine, kept on disk, and taken only where that was asked for."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probes import launches

import fused_pref as fp
from fused_pref.__main__ import main
from fused_pref.cli import constants, measure
from fused_pref.head.plans import planner
from fused_pref.ops import devices
from fused_pref.ops.triton import configs

CPU = torch.device("cpu")
COMMAND = ["tune", "--hidden", "32", "--vocab", "97", "--tokens", "8", "--dtype", "float32", "--device", "cpu"]
ENTRY: dict[str, Any] = {
    "rates": {"2": 3e12, "4": 2e12, "8": 1e12}, "bandwidth": 4e10, "date": "2026-11-30", "sizes": "N=8",
    "milliseconds": {"unfused": 12.5},
}  # fmt: skip
SIZES = measure.Sizes(tokens=8, hidden=16, vocabulary=70, dtype=torch.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that takes nothing from it."""
    monkeypatch.delenv("FUSED_PREF_TUNE", raising=False)
    monkeypatch.setenv("FUSED_PREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "measured", None)
    monkeypatch.setattr(measure, "SPAN", 0.0)
    monkeypatch.setattr(measure, "BYTES", {"cpu": 2**20})
    constants.figures_at.cache_clear()
    return tmp_path / "cache"


def keep(folder: Path, entry: Any) -> Path:
    """The file with an entry for this processor."""
    folder.mkdir(exist_ok=True)
    path = folder / "devices.json"
    path.write_text(json.dumps({"version": 1, "entries": {constants.key_of(CPU): entry}}))
    return path


def planned_with() -> devices.Device:
    """The device that a call plans for."""
    seen = []

    def note(problem: Any) -> Any:
        seen.append(problem.device)
        return planner.choose(problem)

    with planner.planning(note):
        fp.linear_token_logps(torch.randn(1, 3, 8), torch.randn(9, 8), torch.zeros(1, 3, dtype=torch.int64))
    return seen[0]


def test_the_command_measures_and_keeps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{constants.key_of(CPU)}: measured in ")
    for line in ("products, 16-bit, TFLOP/s", "products, 32-bit, TFLOP/s", "products, 64-bit, TFLOP/s", "memory, GB/s"):
        assert f"\n{line} " in out
    assert "\nlinear_cpo_loss, forward and backward, at N=8, D=32, V=97, float32:\n  unfused, ms " in out
    assert f"\nkept in {folder / 'devices.json'}; " in out
    (entry,) = json.loads((folder / "devices.json").read_text())["entries"].values()
    assert set(entry["milliseconds"]) == set(entry["predicted"]) == {"unfused"}
    found = constants.with_figures(entry, devices.CPU)
    assert found is not None
    assert found.rates == {int(size): rate for size, rate in entry["rates"].items()}
    assert found.rates.keys() == devices.CPU.rates.keys()


def test_figures_are_taken_where_they_are_asked_for_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(folder, ENTRY)
    assert planned_with() is devices.CPU
    constants.use()
    found = planned_with()
    assert found.rates == {2: 3e12, 4: 2e12, 8: 1e12}
    assert found.bandwidth == 4e10
    assert found.measured == "this machine, measured on 2026-11-30"
    assert replace(found, rates=devices.CPU.rates).outputs == devices.CPU.outputs
    # A running process keeps its figures, and its plans with them.
    keep(folder, ENTRY | {"bandwidth": 9e10})
    assert planned_with() is found
    monkeypatch.setattr(devices, "measured", None)
    monkeypatch.setattr(constants.cache, "read", lambda path: pytest.fail("the file was read"))
    assert planned_with() is devices.CPU


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "rm -rf",
        {},
        ENTRY | {"rates": [1e12]},
        ENTRY | {"rates": {"two": 1e12}},
        ENTRY | {"rates": {"2": -1e12}},
        ENTRY | {"rates": {"2": "1e12"}},
        ENTRY | {"bandwidth": float("nan")},
        ENTRY | {"bandwidth": float("inf")},
        ENTRY | {"bandwidth": True},
        ENTRY | {"epilogue": 0},
        ENTRY | {"date": "today"},
        {key: value for key, value in ENTRY.items() if key != "date"},
    ],
    ids=range(14),
)
def test_entries_that_are_not_ours_are_as_none(entry: Any, folder: Path) -> None:
    keep(folder, entry)
    constants.use()
    assert planned_with() is devices.CPU
    assert list(constants.notes(CPU)) == ["planned by constants, not measured here: see python -m fused_pref tune"]


def test_of_another_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(folder, ENTRY)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    constants.use()
    assert planned_with() is devices.CPU
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    constants.figures_at.cache_clear()
    assert planned_with() is devices.CPU


def test_ranks_of_a_vocabulary_keep_the_constants(folder: Path) -> None:
    """With the setting, in a process that starts with it."""
    code = (
        "import torch, torch.distributed as dist, fused_pref as fp\n"
        "from fused_pref.head.plans import planner\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "note = lambda problem: (print(problem.device.measured), planner.choose(problem))[1]\n"
        "inputs = torch.randn(1, 3, 8), torch.randn(9, 8), torch.zeros(1, 3, dtype=torch.int64)\n"
        "with planner.planning(note):\n"
        "    for group in (None, dist.group.WORLD): fp.linear_token_logps(*inputs, tp_group=group)\n"
    )
    environment = {**os.environ, "FUSED_PREF_TUNE": "1"}
    threads = "import torch\nprint(torch.get_num_threads())"
    call = [sys.executable, "-c"]
    said = subprocess.run([*call, threads], check=True, env=environment, capture_output=True, text=True).stdout
    key = constants.key_of(CPU).replace(f"{torch.get_num_threads()} threads", f"{int(said)} threads")
    folder.mkdir()
    (folder / "devices.json").write_text(json.dumps({"version": 1, "entries": {key: ENTRY}}))
    done = subprocess.run([*call, code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["this machine, measured on 2026-11-30", devices.CPU.measured]


@pytest.mark.parametrize("command", ["doctor", "explain --hidden 64 --vocab 512 --tokens 32 --device cpu"])
def test_commands_say_what_was_measured(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_pref.cli.doctor.self_checks", lambda device: [])
    outputs = []
    for entry, setting in ((None, None), (ENTRY, None), (ENTRY, constants.figures_at)):
        keep(folder, entry)
        monkeypatch.setattr(devices, "measured", setting)
        assert main(command.split()) == 0
        outputs.append(capsys.readouterr().out)
    assert "planned by constants, not measured here" in outputs[0]
    assert "planned by constants; figures measured on 2026-11-30 are used with FUSED_PREF_TUNE=1" in outputs[1]
    assert "planned by figures measured on 2026-11-30\n" in outputs[2]
    for index, output in enumerate(outputs):
        assert ("measured, N=8: unfused 12.5 ms" in output) == (index > 0)
    if command.startswith("explain"):
        assert ["(figures of this machine, measured on" in output for output in outputs] == [False, False, True]


def test_another_device_has_no_notes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(folder, ENTRY)
    assert main(["explain", "--model", "phi-4", "--device", "sm_90"]) == 0
    assert "planned by" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", '{"version": 2, "entries": {}}', "[]"])
def test_a_file_that_is_not_ours_is_refused_before_anything_is_measured(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measured", None)
    path = keep(folder, None)
    path.write_text(content)
    assert main(COMMAND) == 2
    assert "devices.json is ignored, and not written to until it is removed" in capsys.readouterr().err
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("a file where the folder should be")
    assert main(COMMAND) == 2
    assert f"cannot write to the folder {folder}: " in capsys.readouterr().err


def test_a_step_that_would_take_too_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST", 0.0)
    assert main(COMMAND) == 0
    assert "a step would take too long: give it fewer --tokens\n" in capsys.readouterr().out


def test_sizes() -> None:
    given = {"model": None, "hidden": None, "vocabulary": None, "tokens": None, "dtype": "bfloat16"}
    gpu = torch.device("cuda")
    assert str(measure.sizes_of(SimpleNamespace(**given), CPU)) == "N=512, D=1024, V=32768, bfloat16"  # type: ignore
    assert str(measure.sizes_of(SimpleNamespace(**given), gpu)) == "N=8192, D=4096, V=128256, bfloat16"  # type: ignore
    given |= {"model": "phi-4", "hidden": 7, "dtype": "float16"}
    assert str(measure.sizes_of(SimpleNamespace(**given), CPU)) == "N=512, D=7, V=100352, float16"  # type: ignore


def test_the_least_of_several_calls_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 4.5, 5.0, 7.0, 8.0, 9.0, 12.0, 12.0])
    monkeypatch.setattr(measure, "SPAN", 10.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert measure.timer_of(CPU)(lambda: calls.append(0)) == 2.0
    assert len(calls) == 4


def test_the_progress_bar() -> None:
    terminal, plain = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for stream in (terminal, plain):
        bar = measure.Bar(2, stream)
        for what in ("memory", "a step", ""):
            bar(what)
    assert terminal.getvalue().split("\r\033[K") == ["", "[  ] 0/2 memory", "[# ] 1/2 a step", ""]
    assert plain.getvalue() == ""


# Kernels


def test_both_loops_are_timed_and_the_faster_is_kept(folder: Path, kernel_device: str) -> None:
    if kernel_device != "cpu":
        pytest.skip("times are given, not measured")
    from fused_pref.cli import tune

    def timer(run: Any) -> float:
        run()
        return next(times)

    before, times = configs.chooser, iter([2.0, 1.0, 3.0, 4.0])
    assert measure.loop_seconds(CPU, SIZES, timer) == {"nested": 2.0, "flattened": 1.0}
    assert configs.chooser is before
    kept = {key.split(" | ")[2]: entry["flattened"] for key, entry in tune.load().items()}
    assert kept == {"linear_statistics": True, "linear_statistics, by index": False}
    # What a search found is not replaced.
    times = iter([1.0, 2.0, 4.0, 3.0])
    assert measure.loop_seconds(CPU, SIZES, timer) == {"nested": 1.0, "flattened": 2.0}
    assert {key.split(" | ")[2]: entry["flattened"] for key, entry in tune.load().items()} == kept


def test_what_the_epilogue_takes() -> None:
    product = 2 * 8 * 70 * 16
    assert measure.epilogue_of(3 * product / 1e9, SIZES, {4: 1e9}) == pytest.approx(2 * product / 1e9 / (8 * 70))
    assert measure.epilogue_of(0.5 * product / 1e9, SIZES, {4: 1e9}) > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_takes_the_form_that_is_measured(fused: bool, kernel_device: str) -> None:
    figures = replace(devices.CPU, epilogue=1e-12)
    with launches() as recorder:
        seconds, predicted = measure.step_seconds(
            torch.device(kernel_device), SIZES, figures, fused, lambda step: (step(), 1.5)[1]
        )
    assert seconds == 1.5
    assert 0 < predicted < 1
    assert any(name.startswith("_linear_") for name in recorder.names) == fused
