"""Malformed command lines: status 2, one line on stderr that says what is wrong, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from fused_pref.__main__ import main
from fused_pref.ops.devices import GPUS

MODEL = ("--model", "phi-4", "--device", "cpu")
# arguments, part of the message (with "--" that of argparse, which differs between versions of Python)
TOP = [
    ("", "argument COMMAND: invalid choice: ''"),
    ("--", ""),
    ("-- doctor", ""),
    ("DOCTOR", "argument COMMAND: invalid choice: 'DOCTOR'"),
    ("doc", "argument COMMAND: invalid choice: 'doc'"),
    ("doctor explain", "unrecognized arguments: explain"),
    ("doctor -h=3", "argument -h/--help: ignored explicit argument '3'"),
    ("--all explain", "unrecognized arguments: --all"),
    ("-x", "unrecognized arguments: -x"),
]
EXPLAIN = [
    ("", "model must be one of "),
    ("--model", "argument --model: expected one argument"),
    ("--model gpt-9", "argument --model: invalid choice: 'gpt-9'"),
    ("--model Phi-4", "argument --model: invalid choice: 'Phi-4'"),
    ("--hidden 8", "or hidden and vocab given; got None"),
    ("--hidden 0 --vocab 9", "hidden must be an integer >= 1; got 0"),
    ("--hidden 8 --vocab -9", "vocab must be an integer >= 1; got -9"),
    ("--model phi-4 --hidden 0", "hidden must be an integer >= 1; got 0"),
    ("--model phi-4 --vocab 0", "vocab must be an integer >= 1; got 0"),
    ("--model phi-4 --tokens many", "argument --tokens: invalid int value: 'many'"),
    ("--model phi-4 --tokens 1.5", "argument --tokens: invalid int value: '1.5'"),
    ("--model phi-4 --tokens -1", "tokens must be an integer >= 0; got -1"),
    ("--model phi-4 --tokens 99999999999999999999", "tokens must be an integer of 64 bits"),
    ("--model phi-4 --objective KTO", "argument --objective: invalid choice: 'KTO'"),
    ("--model phi-4 --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("--model phi-4 --device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--model phi-4 --sequences 3", "sequences must be even: pairs of chosen and rejected; got 3"),
    ("--model phi-4 --sequences 0", "sequences must be an integer >= 1; got 0"),
    ("--model phi-4 --positions 2", "positions must be an integer >= 8192; got 2"),
    ("--model phi-4 --gradients logits", "argument --gradients: invalid choice: 'logits'"),
    ("--model phi-4 --delta mean", "argument --delta: invalid choice: 'mean'"),
    ("--model phi-4 --memory-budget 1GB", "argument --memory-budget: invalid int value: '1GB'"),
    ("--model phi-4 --memory-budget 0", "memory_budget must be an integer >= 1, or None; got 0"),
    ("--model phi-4 --memory-budget 5", "memory_budget must be at least "),
    ("--model phi-4 --skip-mass nan", "skip_mass must be a number in [0, 1); got nan"),
    ("--model phi-4 --skip-mass 1", "skip_mass must be a number in [0, 1); got 1.0"),
    ("--model phi-4 --skip-mass some", "argument --skip-mass: invalid float value: 'some'"),
    ("--model phi-4 --all yes", "unrecognized arguments: yes"),
]
PARITY = [
    ("--shape 2x3", "--shape must be SxTxDxV with an even S, as 8x128x512x32768; got '2x3'"),
    ("--shape 3x3x3x3", "got '3x3x3x3'"),
    ("--shape 2x3x4x0", "got '2x3x4x0'"),
    ("--shape 2x3x4x-5", "got '2x3x4x-5'"),
    ("--shape 2X3X4X5", "got '2X3X4X5'"),
    ("--shape 2.0x3x4x5", "got '2.0x3x4x5'"),
    ("--shape 2x3x4x5x", "got '2x3x4x5x'"),
    ("--shape 2x3x4x99999999999999999999", "got '2x3x4x99999999999999999999'"),
    ("--shape", "argument --shape: expected one argument"),
    ("--device meta", "--device must be a device that holds values; got 'meta'"),
    ("--device CPU", "--device must be a device that is available here; got 'CPU'"),
    ("--device xpu:7", "--device must be a device that is available here; got 'xpu:7'"),
    ("--device cuda:99", "--device must be a device that is available here; got 'cuda:99'"),
    ("--seeds 1.5", "argument --seeds: invalid int value: '1.5'"),
    ("--seeds -2", "--seeds must be at least 1; got -2"),
    ("--works kto", "argument --works: invalid choice: 'kto'"),
    ("--works", "argument --works: expected at least one argument"),
    ("--dtypes float64", "argument --dtypes: invalid choice: 'float64'"),
    ("--logits steep", "argument --logits: invalid choice: 'steep'"),
    ("--backends cuda", "argument --backends: invalid choice: 'cuda'"),
    ("quick", "unrecognized arguments: quick"),
]
KERNELS = [
    ("--targets", "argument --targets: expected one argument"),
    ("--targets SM_90", f"argument --targets: must be of {','.join(GPUS)}; got 'SM_90'"),
    ("--targets sm_90,", f"argument --targets: must be of {','.join(GPUS)}; got ''"),
    ("--targets sm_12,sm_90,sm_11", "got 'sm_11', 'sm_12'"),
    ("--targets sm_80 sm_90", "unrecognized arguments: sm_90"),
    ("--json=1", "argument --json: ignored explicit argument '1'"),
]
DEMO = [
    ("--objective CPO", "argument --objective: invalid choice: 'CPO'"),
    ("--objective", "argument --objective: expected one argument"),
    ("--steps 1e3", "argument --steps: must be an integer >= 1; got '1e3'"),
    ("--steps +3", "argument --steps: must be an integer >= 1; got '+3'"),
    ("--seed 1.0", "argument --seed: must be an integer in [0, 2**32); got '1.0'"),
    ("--cap -1", "argument --cap: must be a finite number > 0; got '-1'"),
    ("--cap 1,5", "argument --cap: must be a finite number > 0; got '1,5'"),
    ("--cap 1e400", "argument --cap: must be a finite number > 0; got '1e400'"),
    ("--Steps 3", "unrecognized arguments: --Steps 3"),
    ("--data", "argument --data: expected one argument"),
    ("--data /dev/null", "/dev/null: at least 4 records are needed; got 0"),
    ("--out /dev/null", "argument --out: cannot write to the folder /dev/null: File exists"),
    ("records.jsonl", "unrecognized arguments: records.jsonl"),
]
TABLES = {"": TOP, "explain": EXPLAIN, "parity": PARITY, "kernels": KERNELS, "demo": DEMO}

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
LINE = json.dumps(GOOD).encode() + b"\n"
# A file of records, part of the message.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ": at least 4 records are needed; got 0"),
    "blank": (b"\n \n\t\n", ": at least 4 records are needed; got 0"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "line 1: not UTF-8 at byte 1"),
    "Latin-1": (LINE + LINE.replace(b'"p"', b'"\xe9"'), "line 2: not UTF-8 at byte 13"),
    "compressed": (b"\x1f\x8b\x08\x00abc", "line 1: not UTF-8 at byte 2"),
    "zeros": (b"\0" * 64, "line 1: not valid JSON: Expecting value at column 1"),
    "an array": (json.dumps([GOOD] * 5).encode(), "line 1: must be a JSON object"),
    "over several lines": (json.dumps(GOOD, indent=1).encode(), "line 1: not valid JSON"),
    "a table": (b"prompt,chosen,rejected\np,c,r\n", "line 1: not valid JSON"),
    "three": (LINE * 3, ": at least 4 records are needed; got 3"),
    "one part": ((json.dumps({**GOOD, "split": "train"}) + "\n").encode() * 5, "got 5 for train and 0 for heldout"),
}
# The second line of five, part of the message.
RECORDS: dict[str, tuple[bytes, str]] = {
    "true": (b"true", "must be a JSON object with prompt, chosen, rejected; got true"),
    "a number": (b"3.5", "must be a JSON object with prompt, chosen, rejected; got 3.5"),
    "not a number": (LINE.replace(b'"p"', b"NaN"), "'prompt' must be a string; got NaN"),
    "a flag": (LINE.replace(b'"c"', b"false"), "'chosen' must be a string; got false"),
    "an object": (LINE.replace(b'"p"', b'{"a": 1}'), "'prompt' must be a string; got {\"a\": 1}"),
    "deep": (LINE.replace(b'"p"', b"[" * 900 + b"]" * 900), "'prompt' must be a string; got [[["),
    "many digits": (LINE.replace(b'"p"', b"9" * 5000), "not valid JSON: a number has too many digits"),
    "another case": (
        LINE.replace(b"prompt", b"Prompt"),
        "the key 'prompt' is missing; got 'Prompt', 'chosen', 'rejected'",
    ),
    "a key of two lines": (LINE.replace(b"prompt", b"pro\\nmpt"), r"the key 'prompt' is missing; got 'pro\nmpt'"),
    "white space": (LINE.replace(b'"c"', b'"\\n\\t"'), "'chosen' must not be empty"),
    "no-break space": (LINE.replace(b'"r"', '"\u00a0"'.encode()), "'rejected' must not be empty"),
    "a comma": (LINE.replace(b"}", b",}"), "not valid JSON: "),
    "single quotes": (LINE.replace(b'"', b"'"), "not valid JSON: "),
    "cut off": (LINE[:20], "not valid JSON: "),
    "control character": (LINE.replace(b'"p"', b'"\x01"'), "not valid JSON: Invalid control character"),
    "no split": (json.dumps({**GOOD, "split": None}).encode(), "'split' must be one of ('train', 'heldout'); got null"),
    "splits": (json.dumps({**GOOD, "split": ["train"]}).encode(), "'split' must be one of ('train', 'heldout'); got"),
    "Split": (json.dumps({**GOOD, "split": "Train"}).encode(), "'split' must be one of ('train', 'heldout'); got"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command line is refused with."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused_pref: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    ("command", "options", "message"), [(command, *row) for command, rows in TABLES.items() for row in rows]
)
def test_options(
    command: str,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*command.split(), *options.split()] or [""]
    assert message in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content, message = FILES[name]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    assert message in refused(["demo", "--data", str(path)], capsys)


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line, message = RECORDS[name]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(LINE + line.rstrip(b"\n") + b"\n" + LINE * 3)
    found = refused(["demo", "--data", str(path)], capsys)
    assert f"{path}, line 2: " in found
    assert message in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "a\nb"],
        ["explain", "--model", "a\nb"],
        ["parity", "--device", "a\nb"],
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
