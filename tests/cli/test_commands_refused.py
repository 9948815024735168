"""Command lines that are refused: status 2, one line on stderr that says what is wrong, and nothing else."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from fused_pref.__main__ import COMMANDS, main
from fused_pref.ops.devices import GPUS

# What a command cannot do without.
NEEDED = {"explain": "--model=phi-4", "ref-logps": "rows.jsonl --model=nowhere --out=out.jsonl"}
# What comes before the command or in its place (with "--" the message differs between versions of Python).
TOP = [
    ("", "argument COMMAND: invalid choice: ''"),
    ("--", ""),
    ("-- doctor", ""),
    ("DOCTOR", "argument COMMAND: invalid choice: 'DOCTOR'"),
    ("doctor explain", "unrecognized arguments: explain"),
    ("--all explain", "unrecognized arguments: --all"),
    *(
        (f"{command} {NEEDED.get(command, '')} --Colour red", "unrecognized arguments: --Colour red")
        for command in COMMANDS
    ),
]
STEPS, SEED = "argument --steps: must be an integer >= 1", "argument --seed: must be an integer in [0, 2**32)"
CAP = "argument --cap: must be a finite number > 0"
SHAPE = "--shape must be SxTxDxV with an even S, as 8x128x512x32768; got "
AVAILABLE = "--device must be a device that is available here; got "
# Of options with a rule of their own, by command: their values, and the message.
RULES: dict[str, list[tuple[str, str]]] = {
    "explain --plot": [
        ("picture.gif", "argument --plot: "),
        ("nowhere/picture.svg", "cannot write 'nowhere/picture.svg'"),
    ],
    "parity --shape": [
        (text, f"{SHAPE}{text!r}")
        for text in (*("2x3", "3x3x3x3", "2x3x4x0", "2x3x4x-5", "2X3X4X5", "2.0x3x4x5", "2x3x4x5x"), f"2x3x4x{10**19}")
    ],
    "parity --device": [
        ("meta", "--device must be a device that holds values; got 'meta'"),
        *((text, f"{AVAILABLE}{text!r}") for text in ("CPU", "xpu:7", "cuda:99")),
    ],
    "kernels --targets": [
        ("SM_90", f"argument --targets: must be of {','.join(GPUS)}; got 'SM_90'"),
        ("sm_90,", "got ''"),
        ("sm_12,sm_90,sm_11", "got 'sm_11', 'sm_12'"),
        ("sm_80 sm_90", "unrecognized arguments: sm_90"),
    ],
    "kernels --cases": [],  # any text; see ``test_kernels_compiled.py`` for one that no case has
    "tune --device": [
        ("meta", "--device must be a device that holds values; got 'meta'"),
        *((text, f"{AVAILABLE}{text!r}") for text in ("CPU", "xpu:7", "cuda:99")),
    ],
    "demo --steps": [(text, f"{STEPS}; got '{text}'") for text in ("0", "-3", "2.5", "1e3", "+3", "many")],
    "demo --seed": [(text, f"{SEED}; got '{text}'") for text in ("-1", "1.0", str(2**32), "x")],
    "demo --cap": [(text, f"{CAP}; got '{text}'") for text in ("0", "-1", "inf", "nan", "1,5", "1e400", "soon")],
    "ref-logps --model": [],  # any text, and any file; see ``test_ref_logps.py`` for what is not there
    "ref-logps --out": [],
    "ref-logps --tokenizer": [],
    "ref-logps --chat-template": [],
    "ref-logps --max-length": [
        (text, f"argument --max-length: must be an integer >= 1, or none; got '{text}'")
        for text in ("0", "None", "1.5")
    ],
    "ref-logps --ld-alpha": [
        (text, f"argument --ld-alpha: must be a number in [0, 1]; got '{text}'") for text in ("-1", "1.1", "nan", "x")
    ],
    "ref-logps --kl-batch-size": [
        (text, f"argument --kl-batch-size: must be an integer >= 2; got '{text}'") for text in ("0", "1", "x")
    ],
    "ref-logps --batch-size": [("0", "argument --batch-size: must be an integer >= 1; got '0'")],
    "demo --out": [("/dev/null", "argument --out: cannot write to the folder /dev/null: File exists")],
    "demo --data": [("/dev/null", "/dev/null: at least 4 records are needed; got 0")],
}
# What the library refuses, not the parser; ``test_explain_refused.py`` has it all.
LIBRARY = [
    ("explain", "model must be one of "),
    ("explain --hidden 0 --vocab 9", "hidden must be an integer >= 1; got 0"),
    ("explain --model phi-4 --memory-budget 5", "memory_budget must be at least "),
    ("explain --model phi-4 --skip-mass nan", "skip_mass must be a number in [0, 1); got nan"),
    ("tune --hidden 1", "argument --hidden: must be an integer >= 2; got 1"),
    ("tune --tokens -5", "argument --tokens: must be an integer >= 2; got -5"),
    ("parity --seeds -2", "--seeds must be at least 1; got -2"),
]


def actions(command: str) -> dict[str, argparse.Action]:
    """The options of a command."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return {action.option_strings[-1]: action for action in parser._actions if action.option_strings}


def malformed(command: str, option: str) -> list[tuple[str, str]]:
    """Command lines with a malformed option, and their messages."""
    action = actions(command)[option]
    start = f"argument {'/'.join(action.option_strings) or option}: "
    rules = [(f"{option} {value}", message) for value, message in RULES.get(f"{command} {option}", [])]
    if action.nargs == 0:
        return [
            (f"{option}=1", f"{start}ignored explicit argument '1'"),
            (f"{option} yes", "unrecognized arguments: yes"),
        ]
    if action.choices is not None:
        rules.append((f"{option} neither", f"{start}invalid choice: 'neither'"))
    elif action.type in (int, float):
        rules.append((f"{option} 1.5.0", f"{start}invalid {action.type.__name__} value: '1.5.0'"))
    assert rules or f"{command} {option}" in RULES, f"{command} {option} has no rule"
    lacking = {None: "expected one argument", "+": "expected at least one argument"}.get(action.nargs)
    return [*rules, *([(option, start + lacking)] if lacking else [])]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command line is refused with."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused_pref: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(("line", "message"), TOP + LIBRARY)
def test_lines(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(line.split() or [""], capsys)


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in COMMANDS for option in actions(command)]
)
def test_options(
    command: str,
    option: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, message in malformed(command, option):
        assert message in refused([command, *NEEDED.get(command, "").split(), *line.split()], capsys)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "a\nb"],
        ["explain", "--model", "a\nb"],
        ["parity", "--device", "a\nb"],
        ["tune", "--device", "a\nb"],
        ["parity", "--shape", ""],
        ["kernels", "--targets", "sm_80\nsm_90"],
        ["kernels", "--targets", ""],
        ["demo", "--data", "a\nb"],
        ["demo", "--data", ""],
        ["demo", "--data", "x" * 300],
        ["demo", "--steps", ""],
        ["demo", "--seed", "9" * 5000],
        ["demo", "--cap", ""],
    ],
)
def test_texts_that_are_empty_long_or_of_two_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(arguments, capsys)


def test_kernels_cannot_be_compiled_in_the_interpreter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_pref.cli.kernels.report.compile_obstacle", lambda: "nothing to compile with")
    assert refused(["kernels"], capsys) == "fused_pref: kernels cannot be compiled: nothing to compile with\n"


def test_a_backend_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_pref.cli.parity.triton_obstacle", lambda device: "there is none")
    assert "--backends triton is not available: there is none" in refused(["parity", "--backends", "triton"], capsys)


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("fused_pref.cli.demo.command.train_objectives", None)
    message = f"argument --out: cannot write to the folder {tmp_path}: Permission denied"
    assert message in refused(["demo", "--out", str(tmp_path)], capsys)
