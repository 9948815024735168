"""The report in its small form, what it does when it is cut off, scaling, and the predictions."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, skipping
from benchmarks.__main__ import COMMANDS, main
from benchmarks.report import command as report
from benchmarks.report import sections
from benchmarks.report.sections import SECTIONS, Command, Context
from benchmarks.static import plans
from fused_pref.cli.usage import UsageError

ROOT = Path(__file__).resolve().parents[2]
# Without the interpreter, and with one thread each: workers share the cores.
CLEAN = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def benchmarks(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start the command, after the statements of ``before``."""
    command = [sys.executable, "-c", f"{before}\nfrom benchmarks.__main__ import main\nraise SystemExit(main())"]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN
    )


def results_of(page: str) -> list[tuple[str, str, str]]:
    """Section, command and result of the lines."""
    return re.findall(r"^\| (\w+) \| ([\w-]*) \| (.*) \|$", page, re.MULTILINE)[1:]


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    """The sections whose commands nothing else runs, each in its process; what one measures the next one shows."""
    names = ["environment", "tests", "compare", "profile", "predictions"]
    process = benchmarks("report", "--device", "cpu", "--minutes", "2", "--sections", *names, "--out", str(tmp_path))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    page = (tmp_path / "report.md").read_text()
    assert "running" not in page
    results = results_of(page)
    assert list(dict.fromkeys(name for name, *_ in results)) == names
    for name in ("machine", "packages", "compare-tiny", "profile", "static"):
        assert [result[:4] for _, own, result in results if own == name] == ["done"], page
        assert (tmp_path / f"{name}.log").stat().st_size > 0
    assert ("tests", "", "absent: there is no GPU") in results
    rows = json.loads((tmp_path / "compare-tiny" / "compare.json").read_text())["rows"]
    assert {row["status"] for row in rows if row["implementation"] == "fused_pref"} == {"ok"}
    assert "not measured" in (tmp_path / "static.log").read_text()
    assert (tmp_path / "profile" / "profile.txt").exists()


def test_sections_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in their order, with commands that are taken; what these do is tested by itself."""
    asked: dict[str, tuple[str, ...]] = {}
    monkeypatch.setattr(report.Report, "run", lambda self, it, seconds: asked.update({it.name: it.argv}) or "done")
    (tmp_path / "compare-tiny").mkdir()
    (tmp_path / "compare-tiny" / "compare.json").touch()
    assert main(["report", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = results_of((tmp_path / "report.md").read_text())
    assert list(dict.fromkeys(name for name, *_ in results)) == list(SECTIONS)
    assert {own for _, own, result in results if result == "done"} == set(asked)
    assert asked["doctor"][1:] == ("-m", "fused_pref", "doctor")
    assert asked["static"][-2:] == ("--measured", str(tmp_path / "compare-tiny" / "compare.json"))
    for module in ("benchmarks.compare.command", "benchmarks.scaling", "benchmarks.static.command"):
        monkeypatch.setattr(f"{module}.run", lambda args: 0)
    for _, flag, name, *rest in asked.values():
        if (flag, name) == ("-m", "benchmarks"):
            assert main([argument.replace("{seconds}", "9") for argument in rest]) == 0


def test_skipping(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["skipping", "--shape", "8x16x300", "--rounds", "1", "--device", "cpu"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:4]] == ["bare products", "skip_mass=None"]
    assert rows[2][1:4] == ["3.00", "1.00", "1.00"]
    assert len(rows) == 2 + 1 + len(skipping.MASSES)
    assert float(rows[-1][4]) <= 2**-6


# Two sections, the second of which takes as long as it may.
SHORT = """
from benchmarks.report import sections
for name, text in {"environment": "print('torch')", "compare": "import time; time.sleep(60)"}.items():
    command = sections.python({"environment": "machine", "compare": "compare-tiny"}[name], "-c", text)
    sections.SECTIONS[name] = sections.Section("", lambda context, command=command: iter([command]), 1.0)
"""


@pytest.mark.slow
def test_report_that_is_ended_keeps_what_is_done(tmp_path: Path) -> None:
    process = benchmarks(
        "report", "--device", "cpu", "--sections", "environment", "compare", "--out", str(tmp_path), before=SHORT
    )
    page, deadline = tmp_path / "report.md", time.monotonic() + 60
    while time.monotonic() < deadline and not (page.exists() and "| compare-tiny | running |" in page.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1].endswith("benchmarks: interrupted\n")
    assert process.returncode == 130
    text = page.read_text()
    assert "| environment | machine | done in " in text
    assert "| compare | compare-tiny | interrupted: [compare-tiny.log](compare-tiny.log) |" in text
    assert "running" not in text
    assert "torch" in (tmp_path / "machine.log").read_text()


@pytest.mark.slow
def test_a_command_that_fails_or_takes_too_long(tmp_path: Path) -> None:
    made = report.Report(Context("cpu", tmp_path), time.monotonic() + 60)
    slow = sections.python("slow", "-c", "print('begun', flush=True); import time; time.sleep(60)")
    start = time.monotonic()
    assert made.run(slow, 2).startswith("cut off after 2 s")
    assert time.monotonic() - start < 20
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    assert not made.failed
    assert made.run(sections.python("bad", "-c", "raise SystemExit(3)"), 30).startswith("**failed** with status 3")
    assert made.failed
    told = sections.python("told", "-c", "import sys; print(sys.argv[1])", "{seconds}")
    assert made.run(told, 30).startswith("done in ")
    assert (tmp_path / "told.log").read_text() == "24\n"


def test_what_no_longer_fits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Command("long", ("never",), least=1000)
    monkeypatch.setitem(SECTIONS, "tests", sections.Section("", lambda context: iter([long, "no reason"]), 1.0))
    made = report.Report(Context("cpu", tmp_path), time.monotonic() + 60)
    made.section("tests", 1.0)
    assert made.lines[-2].startswith("| tests | long | left out: it needs 1000 s, and ")
    assert made.lines[-1] == "| tests |  | absent: no reason |"
    assert (tmp_path / "report.md").read_text().splitlines() == made.lines


def test_search_of_configurations_is_for_gpus(tmp_path: Path) -> None:
    assert list(sections.tune(Context("cpu", tmp_path))) == ["there is no GPU"]
    (found,) = sections.tune(Context("cuda", tmp_path))
    assert isinstance(found, Command)
    assert found.argv[-1] == "benchmarks.report.tune"


def test_search_of_configurations_prints_every_candidate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Interpreted, with a clock that always tells the same."""
    from benchmarks.report import tune
    from fused_pref.cli import tune as search

    monkeypatch.setenv("FUSED_PREF_CACHE", str(tmp_path))
    monkeypatch.setattr(search.triton.testing, "do_bench", lambda launch: launch() or 1.0)
    monkeypatch.setattr("sys.argv", ["tune", "--device", "cpu", "--shape", "2x3x16x40", "--dtype", "float32"])
    tune.main()
    out = capsys.readouterr().out
    for name in ("linear CPO", "log-probs", "CPO of logits"):
        assert f"{name}, 2x3x16x40" in out
    assert out.count("| 1.000 |") > 3


def test_presets_of_the_report_are_for_its_device() -> None:
    from benchmarks.compare.presets import PRESETS

    for device, names in sections.PRESETS.items():
        assert {PRESETS[name].device for name in names} == {device}


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--device", "cpu", "--small", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert len(rows) == 3 * sum(map(len, scaling.AXES["small"].values()))
    for work in scaling.MEASURED:
        found = [row["launches"] for row in rows if row["work"] == work and row["axis"] == "N"]
        assert found[0] > 10
        assert set(found) == {found[0]}
    assert [row["of_last"] for row in rows if row["N"] == 256] == [1.0] * 3
    assert (tmp_path / "scaling.md").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("axis", ["N", "V", "D"])
def test_axes_of_scaling_vary_one_size(axis: str) -> None:
    for axes in scaling.AXES.values():
        assert {place for place in (0, 1, 2) if len({sizes[place] for sizes in axes[axis]}) > 1} == {
            scaling.PLACE[axis]
        }


# Of the cases two, of one launch and of two; of the heads the widest and the narrowest.
FEW = """
from benchmarks.static import head, logits, loops
from fused_pref.cli.kernels import cases
cases.CASES[:] = [case for case in cases.CASES if case.name in ("split", "depth cut, bias")]
for name in [name for name in logits.LAUNCHES if "None" in name or name == "backward"]:
    del logits.LAUNCHES[name]
head.SHAPES = loops.SHAPES = head.SHAPES[::2]
"""


@pytest.mark.slow
def test_predictions(tmp_path: Path) -> None:
    """Of one GPU: no prediction is below its floor, and what was measured stands beside it.

    That no kernel spills in any case is in tests/ops/test_kernels_compiled.py.
    """
    row = {
        "implementation": "fused_pref", "status": "ok", "dtype": "bfloat16", "sequences": 16, "length": 512,
        "tokens": 8192, "features": 4096, "vocabulary": 151936, "logits": "random", "work": "frozen",
        "median_ms": 12345.6, "of_floor": 7.89, "workspace_bytes": 1 << 30,
    }  # fmt: skip
    measured = tmp_path / "compare.json"
    measured.write_text(json.dumps({"machine": {"architecture": "sm_90"}, "rows": [row]}))
    process = benchmarks("static", "--targets", "sm_90", "--measured", str(measured), before=FEW)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    parts = {part.splitlines()[0]: part for part in out.split("\n## ")[1:]}
    assert len(parts) == 6
    tables = [
        [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        for part in parts.values()
    ]
    kernels, logits, order, head, loops, of_plans = tables
    assert kernels[0][-1] == "spills"
    assert {cells[-1] for cells in kernels[2:]} == {"0"}
    assert {int(cells[5]) >= 1 for cells in kernels[2:]} == {True}
    assert {cells[0] for cells in kernels[2:]} >= {"linear_statistics", "token_logps_fwd"}
    assert all(float(cells[11].strip("*")) >= float(cells[7]) > 0.1 for cells in logits[2:])
    # Set-ups of the pipeline in a loop: of the nested form alone, which is predicted to take as long or longer.
    assert [(cells[2], int(cells[7]) > 0) for cells in loops[2:]] == 2 * [("nested", True), ("flattened", False)]
    times = [float(cells[-1].strip("*")) for cells in loops[2:]]
    assert all(nested >= flattened >= 1 for nested, flattened in zip(times[::2], times[1::2], strict=True))
    # The splits that are taken read no more from memory than the fewest, at the cost of at most 2% in tile steps.
    assert all(float(cells[7].strip("*")) <= float(cells[5]) and float(cells[8]) <= 1.02 for cells in order[2:])
    assert all(1 <= float(cells[-1].strip("*")) < 1.5 for cells in head[2:])
    assert all(float(cells[9]) >= 1 for cells in of_plans[2:] if not cells[5].startswith("none"))
    assert [cells[10:] for cells in of_plans[2:] if "12345.6" in cells] == [["12345.6", "7.89", "1024"]]
    assert sum("not measured" in cells for cells in of_plans[2:]) == len(of_plans) - 3


def test_measured_must_be_results(tmp_path: Path) -> None:
    bad = tmp_path / "x.json"
    bad.write_text("[]")
    for path in (bad, tmp_path / "none.json"):
        with pytest.raises(UsageError, match=f"--measured must be a compare.json; got {path}"):
            plans.load([path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--out", "x", "--minutes", "0"], "--minutes must be above 0; got 0"),
        (["report", "--out", "x", "--sections", "all"], "invalid choice: 'all'"),
        (["report"], "--out"),
        (["report", "--out", "/dev/null/x"], "--out must be a directory that can be written; got /dev/null/x"),
        (["scaling", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["skipping", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["skipping", "--shape", "1536x1024"], "--shape must be NxDxV with an even N, as 1536x1024x32768; got '1536x"),
        (["skipping", "--shape", "15x16x32"], "--shape must be NxDxV with an even N"),
        (["static", "--targets", "sm_70"], "invalid choice: 'sm_70'"),
        (["measure"], "invalid choice: 'measure'"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("benchmarks: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name}")


def test_defaults_of_the_report() -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    args = parser.parse_args(["--out", "x"])
    assert args.minutes == 9
    assert args.sections == list(SECTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compare", "--preset", "tiny", "--out", "FILE"], "--out must be a directory that can be written"),
        (["scaling", "--small", "--out", "FILE"], "--out must be a directory that can be written"),
        (["compare", "--preset", "tiny", "--seconds", "-5"], "--seconds must be above 0; got -5"),
        (["compare", "--preset", "tiny", "--seconds", "0"], "--seconds must be above 0; got 0"),
        (["compare", "--preset", "tiny", "--seconds", "nan"], "--seconds must be above 0; got nan"),
    ],
)
def test_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").touch()
    options = [str(tmp_path / "FILE") if option == "FILE" else option for option in options]
    assert main(options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["compare --preset tiny", "scaling --small", "memory --small", "report"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("benchmarks.measure.seconds_of", None)
    assert main([*command.split(), "--device", "cpu", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert f"--out must be a directory that can be written; got {tmp_path} ([Errno 13]" in captured.err
    assert captured.out == ""


def test_numbers_that_are_none_are_text_in_json() -> None:
    from benchmarks.compare import tables

    row = {"error": math.nan, "ms": math.inf, "peak": 1.5, "status": "ok", "of_floor": None}
    assert tables._plain(row) == row | {"error": "nan", "ms": "inf"}
