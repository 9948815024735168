"""Workspace against tokens: the command, its table and its plot; and that the committed ones agree."""

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import memory
from benchmarks.__main__ import main

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"tokens": tokens, "implementation": name, "status": "ok", "note": "", "workspace_bytes": size * tokens << 20}
    for tokens in (8, 16)
    for name, size in (("eager", 3), ("fused_pref", 1))
]


def said(path: Path) -> str:
    return " ".join("".join(element.itertext()) for element in ElementTree.parse(path).iter() if "text" in element.tag)


def table(text: str) -> list[list[str]]:
    """Cells of the rows of numbers."""
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| \d", line)]


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--small", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "memory.md").read_text()
    assert capsys.readouterr().out == page
    assert "float32, D=16, V=1000" in page
    rows = table(page)
    assert [row[0] for row in rows] == ["16", "32", "64"]
    assert all(row[1].isdecimal() and row[3].isdecimal() for row in rows)
    plot = said(tmp_path / "out" / "memory.svg")
    for part in ("eager PyTorch", "fused_pref", "scored tokens N", "D=16, V=1000"):
        assert part in plot


def test_an_absent_peer_has_no_line(tmp_path: Path) -> None:
    absent = {"tokens": 8, "implementation": "liger_pairs", "status": "absent", "note": "a | b"}
    assert memory.cells([*ROWS[:1], absent, *ROWS[1:2]]) == "| 8 | 24 | absent | 8 | liger_pairs absent: a \\| b |"
    memory.draw([*ROWS, absent], "bfloat16", tmp_path / "plot.svg")
    plot = said(tmp_path / "plot.svg")
    assert "48 MiB" in plot
    assert "16 MiB" in plot
    assert "Liger" not in plot


@pytest.mark.parametrize("status", ["fails the gate", "raised"])
def test_a_failure_of_ours_shows_in_the_status(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_: [{**row, "status": status} for row in ROWS[:2]])
    assert main(["memory", "--small"]) == 1


@pytest.mark.parametrize("tokens", ["0", "-8", "12"])
def test_tokens_are_whole_sequences(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--tokens", tokens]) == 2
    assert "benchmarks: --tokens must be multiples of 8" in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: Any) -> list[dict[str, Any]]:
        return ROWS[:2]

    monkeypatch.setattr(memory, "measure", measured)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["memory", "--small", "--out", str(tmp_path)]) == 0
    assert 'no plot: a plot needs matplotlib: pip install "fused-pref[bench]"' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["memory.md"]


def test_the_committed_plot_is_that_of_the_committed_table() -> None:
    *_, last = table((ROOT / "benchmarks" / "memory.md").read_text())
    picture = ROOT / "docs" / "images" / "memory.svg"
    plot = said(picture)
    for size in last[1:4]:
        assert f"{int(size):,} MiB" in plot
    assert f"{int(last[0]):,}" in plot
    assert picture.stat().st_size < 60_000
