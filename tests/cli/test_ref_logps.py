"""``ref-logps``: the log-probs of TRL, interrupted and gone on with, and what it refuses."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from reference_files import command, rows, save_model, save_rows, talks
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl_models import TEMPLATE, TRAINING, llama, pairs, tokenizer

from fused_pref.__main__ import main
from fused_pref.cli.reference_pass import ReferencePass

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of pairs, made once."""
    return command(tmp_path_factory.mktemp("whole"), model, rows("dpo")).read_bytes()


@pytest.fixture
def made(whole: bytes, tmp_path: Path) -> Path:
    """That file, where the command writes it."""
    path = tmp_path / "reference.jsonl"
    path.write_bytes(whole)
    return path


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, *lines = map(json.loads, path.read_text().splitlines())
    return header, lines


def stock(folder: Path, model: str, trainer: str, content: Any, **changes: Any) -> Any:
    """TRL's own trainer, whose rows have its log-probs."""
    kind, config = (DPOTrainer, DPOConfig) if trainer == "dpo" else (KTOTrainer, KTOConfig)
    loss = {"loss_type": "apo_zero_unpaired"} if trainer == "bco" else {}
    options = {**TRAINING, "max_length": 9, "per_device_train_batch_size": 4, "precompute_ref_batch_size": 4}
    return kind(
        AutoModelForCausalLM.from_pretrained(model),
        args=config(str(folder / "stock"), precompute_ref_log_probs=True, **{**options, **loss, **changes}),
        train_dataset=Dataset.from_list(content),
        processing_class=AutoTokenizer.from_pretrained(model),
    ).train_dataset


CASES: dict[str, tuple[str, Any, list[str], dict[str, Any]]] = {
    "dpo": ("dpo", lambda: rows("dpo"), [], {}),
    "dpo, cut at its start": (
        "dpo",
        lambda: rows("dpo"),
        ["--truncation-mode", "keep_end"],
        {"truncation_mode": "keep_end"},
    ),
    "dpo, desensitised": ("dpo", lambda: rows("dpo"), ["--ld-alpha", "0.5"], {"ld_alpha": 0.5}),
    "dpo, whole rows": ("dpo", lambda: rows("dpo"), ["--max-length", "none"], {"max_length": None}),
    "dpo in bf16": ("dpo", lambda: rows("dpo"), ["--precision", "bf16"], {"bf16": True}),
    "kto": ("kto", lambda: rows("kto"), ["--kl-batch-size", "4"], {}),
    "kto, in other batches": ("kto", lambda: rows("kto"), ["--kl-batch-size", "5"], {"per_device_train_batch_size": 5}),
    "kto of pairs": ("kto", lambda: pairs(6).to_list(), ["--kl-batch-size", "4", "--trainer", "kto"], {}),
    "bco": ("bco", lambda: rows("bco"), ["--trainer", "bco"], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_those_of_trl(name: str, model: str, tmp_path: Path) -> None:
    trainer, make, options, changes = CASES[name]
    header, lines = read(command(tmp_path, model, make(), *options))
    theirs = stock(tmp_path, model, trainer, make(), **changes)
    assert header["trainer"] == trainer
    assert header["rows"] == len(lines) == len(theirs)
    columns = {"dpo": ["ref_chosen_logps", "ref_rejected_logps"], "kto": ["ref_logps", "ref_KL_logps"]}
    assert header["columns"] == columns.get(trainer, ["ref_logps"])
    close = 2e-2 if changes.get("bf16") else 1e-5
    for column in header["columns"]:
        assert column in theirs.column_names
        ours = [line[column] for line in lines]
        assert ours == pytest.approx(theirs[column], rel=close, abs=close)
        assert len(set(ours)) > len(ours) // 2
    if len(make()) == 18 and "max_length" not in changes and "truncation_mode" not in changes:
        # The long prompt leaves nothing of its completions.
        assert [line["row"] for line in lines] == [number for number in range(18) if number != 2]


def test_conversations_and_a_template_of_one_s_own(model: str, tmp_path: Path) -> None:
    other = tmp_path / "template.jinja"
    other.write_text(TEMPLATE.replace("{{ eos_token }}", ""))
    _, ended = read(command(tmp_path / "a", model, talks(), "--max-length", "40"))
    _, lines = read(command(tmp_path / "b", model, talks(), "--max-length", "40", "--chat-template", str(other)))
    assert len(ended) == len(lines) == 18
    assert all(a["ref_chosen_logps"] != b["ref_chosen_logps"] for a, b in zip(ended, lines, strict=True))
    content = [{name: row[name] for name in ("chosen", "rejected")} for row in talks()]
    theirs = stock(tmp_path, model, "dpo", content, max_length=40)
    assert [line["ref_chosen_logps"] for line in ended] == pytest.approx(theirs["ref_chosen_logps"], rel=1e-5)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_other_files_of_rows(suffix: str, model: str, whole: bytes, tmp_path: Path) -> None:
    content = Dataset.from_list(rows("dpo"))
    data, out = tmp_path / f"rows.{suffix}", tmp_path / "out.jsonl"
    {"parquet": content.to_parquet, "csv": content.to_csv, "json": content.to_json}[suffix](data)
    options = ["--max-length", "9", "--precision", "fp32", "--batch-size", "4"]
    assert main(["ref-logps", str(data), "--model", model, "--out", str(out), *options]) == 0
    assert out.read_bytes() == whole


# Interruptions.


def cuts(content: bytes) -> dict[str, int]:
    """Places where a file may end."""
    lines = content.splitlines(keepends=True)
    ends = [sum(map(len, lines[: number + 1])) for number in range(len(lines))]
    return {
        "nothing": 0,
        "half a header": 40,
        "a header": ends[0],
        "half a row": ends[0] + 10,
        "a row and a half": ends[1] + len(lines[2]) // 2,
        "a batch": ends[4],
        "a batch and two rows": ends[6],
        "all but the last line break": len(content) - 1,
        "all": len(content),
    }


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_interrupted_anywhere_it_gives_the_same_file(
    trainer: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command(tmp_path, model, rows(trainer)).read_bytes()
    passes: list[int] = []
    logps = ReferencePass._logps
    monkeypatch.setattr(ReferencePass, "_logps", lambda self, batch: (passes.append(len(batch)), logps(self, batch))[1])
    places = cuts(whole)
    for name in places if trainer == "dpo" else ("half a header", "a batch and two rows"):
        passes.clear()
        (tmp_path / "reference.jsonl").write_bytes(whole[: places[name]])
        assert command(tmp_path, model, rows(trainer)).read_bytes() == whole, name
        # Of 17 rows in batches of 4.
        done = {"a batch": 4, "a batch and two rows": 4, "all but the last line break": 16, "all": 17}.get(name, 0)
        assert sum(passes) == 17 - done, name


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_control_c(
    batches: int,
    model: str,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logps, calls = ReferencePass._logps, []

    def interrupted(self: ReferencePass, batch: Dataset) -> Any:
        calls.append(batch)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return logps(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ReferencePass, "_logps", interrupted)
        out = command(tmp_path, model, rows("dpo"), status=130)
    assert capsys.readouterr().err.endswith("fused_pref: interrupted\n")
    assert out.read_bytes().count(b"\n") == 1 + 4 * batches
    assert command(tmp_path, model, rows("dpo")).read_bytes() == whole


@pytest.mark.slow
def test_killed(model: str, tmp_path: Path) -> None:
    """In a process of its own; what goes on with its file, and what makes a whole one, is this process."""
    content, options = rows("dpo", 60), ["--batch-size", "1"]
    data, out = save_rows(tmp_path / "rows.jsonl", content), tmp_path / "reference.jsonl"
    line = [sys.executable, "-m", "fused_pref", "ref-logps", data, "--model", model, "--out", str(out)]
    line += ["--max-length", "9", "--precision", "fp32", *options]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **threads}
    )
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and (not out.exists() or out.stat().st_size < 1000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = out.read_bytes()
    assert 1 < killed.count(b"\n") < 60
    resumed = command(tmp_path, model, content, *options).read_bytes()
    assert resumed.startswith(killed[: killed.rindex(b"\n")])
    out.unlink()
    assert command(tmp_path, model, content, *options).read_bytes() == resumed


# What is refused: nothing of the file is changed.


def refused(capsys: pytest.CaptureFixture[str], *given: Any) -> str:
    """The last line that the command prints."""
    capsys.readouterr()
    out = given[0] / "reference.jsonl"
    before = out.read_bytes() if out.is_file() else None
    command(*given, status=2)
    assert (out.read_bytes() if out.is_file() else None) == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fused_pref: ")
    return line


SETTINGS = {
    "max_length=12, as asked for; got 9": ["--max-length", "12"],
    "truncation_mode='keep_end', as asked for; got 'keep_start'": ["--truncation-mode", "keep_end"],
    "ld_alpha=0.5, as asked for; got None": ["--ld-alpha", "0.5"],
    "batch_size=3, as asked for; got 4": ["--batch-size", "3"],
    "dtype='bfloat16', as asked for; got 'float32'": ["--dtype", "bfloat16"],
    "precision='bf16', as asked for; got 'fp32'": ["--precision", "bf16"],
    "trainer='kto', as asked for; got 'dpo'": ["--trainer", "kto"],
}


@pytest.mark.parametrize(
    ("message", "lines"), [*zip(SETTINGS, itertools.cycle([3, 18]), strict=False), (next(iter(SETTINGS)), 18)]
)
def test_other_options(
    message: str, lines: int, model: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file that is whole or not."""
    made.write_bytes(b"".join(made.read_bytes().splitlines(keepends=True)[:lines]))
    line = refused(capsys, tmp_path, model, rows("dpo"), *SETTINGS[message])
    assert f"argument --out: {made} must be made with {message}" in line


def test_other_models_and_tokenizers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(tmp_path, model, talks(), "--max-length", "40")
    content = [tmp_path, model, talks(), "--max-length", "40"]
    content[1] = save_model(tmp_path / "other", llama(seed=1))
    assert "must be made with weights='" in refused(capsys, *content)
    content[1] = model
    words = tokenizer()
    words.add_tokens(["w99"])
    words.save_pretrained(tmp_path / "words")
    assert "must be made with vocabulary='" in refused(capsys, *content, "--tokenizer", str(tmp_path / "words"))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE + " ")
    assert "must be made with chat_template='" in refused(capsys, *content, "--chat-template", str(template))
    # The same by another name goes on.
    moved = save_model(tmp_path / "moved")
    before = (tmp_path / "reference.jsonl").read_bytes()
    assert command(tmp_path, moved, talks(), "--max-length", "40").read_bytes() == before


def test_another_batch_of_kl_completions(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(tmp_path, model, rows("kto"), "--kl-batch-size", "4")
    line = refused(capsys, tmp_path, model, rows("kto"), "--kl-batch-size", "5")
    assert "must be made with kl_batch_size=5, as asked for; got 4" in line


@pytest.mark.usefixtures("made")
def test_a_changed_row(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its number in the data, of which row 2 is left out."""
    for number in (0, 3, 17):
        changed = rows("dpo")
        changed[number]["rejected"] += " w5"
        line = refused(capsys, tmp_path, model, changed)
        assert line.endswith(f"must be made of the rows of DATA; got another one for DATA[{number}]")
    assert "must be made with rows=16, as asked for; got 17" in refused(capsys, tmp_path, model, rows("dpo")[:-1])


def test_other_files_are_left(model: str, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reference.jsonl"
    for content in (b"notes\n", b"{}\n", b"[1]\n", b'{"format": "fused_pref ref-logps 0"}\n', b"\xff\n"):
        out.write_bytes(content)
        line = refused(capsys, tmp_path, model, rows("dpo"))
        assert f"argument --out: {out} must be a file that `fused-pref ref-logps` made; got '{out}'" in line
    content = whole.splitlines(keepends=True)
    out.write_bytes(b"".join([*content[:3], b'{"row": 3}\n', *content[4:]]))
    assert 'in line 4; got b\'{"row": 3}' in refused(capsys, tmp_path, model, rows("dpo"))
    out.unlink()
    out.mkdir()
    assert "Is a directory" in refused(capsys, tmp_path, model, rows("dpo"))


def test_rows_that_cannot_be_taken(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"prompt": "w1", "text": "w2"}]
    columns = "argument DATA: must have the columns chosen and rejected or completion and label; got prompt, text"
    assert columns in refused(capsys, tmp_path, model, texts)
    assert "train_dataset must have the columns chosen, rejected" in refused(
        capsys, tmp_path, model, texts, "--trainer", "dpo"
    )
    line = refused(capsys, tmp_path, model, rows("kto"), "--ld-alpha", "0.5")
    assert line.endswith("argument --ld-alpha: is of --trainer dpo alone; got --trainer kto")
    line = refused(capsys, tmp_path, model, rows("dpo"), "--kl-batch-size", "4")
    assert line.endswith("argument --kl-batch-size: is of --trainer kto alone; got --trainer dpo")
    assert "no row of train_dataset has a completion token left" in refused(
        capsys, tmp_path, model, rows("dpo"), "--max-length", "1"
    )
    assert not (tmp_path / "reference.jsonl").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.txt", "argument DATA: must be a file that ends in .jsonl, .json, .parquet, .csv; got 'rows.txt'"),
        ("rows.json", "argument DATA: must be a file; got 'rows.json'"),
        ("broken.jsonl", "argument DATA: cannot read 'broken.jsonl': "),
        ("empty.jsonl", "argument DATA: cannot read 'empty.jsonl': it has no rows"),
    ],
)
def test_data_that_cannot_be_read(
    data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"prompt": \n')
    Path("empty.jsonl").touch()
    assert main(["ref-logps", data, "--model", "nowhere", "--out", "out.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fused_pref: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "empty.jsonl"]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, str(tmp_path / "nowhere"), rows("dpo"))
    assert "nowhere" in line


def test_log_probs_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows before stay."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3 + 33] = float("nan")  # w32
    folder = save_model(tmp_path / "model", model)
    content = [{"prompt": "w1 ", "chosen": f"w{20 + row}", "rejected": "w2"} for row in range(18)]
    out = command(tmp_path, folder, content, status=2)
    message = "fused_pref: the log-prob of DATA[12] under the model is nan, of no use"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert out.read_bytes().count(b"\n") == 13
