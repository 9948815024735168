"""Rows as CSV, JSON and Markdown."""

import csv
import io
import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measure import write
from fused_pref.testing.problems import WORKS, Sizes

KEYS = (
    "preset", "work", "implementation", "status", "dtype", "sequences", "length", "features", "vocabulary", "masked",
    "logits", "tokens", "rounds", "median_ms", "p10_ms", "p90_ms", "tflops", "of_floor", "of_eager", "workspace_bytes",
    "value_error", "hidden_error", "weight_error", "note",
)  # fmt: skip
SIZES = ("sequences", "length", "features", "vocabulary", "masked", "logits")
HEADER = (
    "implementation", "ms", "p10-p90", "TFLOP/s", "of the floor", "of eager", "workspace, MiB", "error: value", "dh",
    "dW", "",
)  # fmt: skip


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no infinity: those are text."""
    odd = {name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return row | odd


def save(rows: list[dict[str, Any]], machine: dict[str, Any], out: Path) -> None:
    """Write ``compare.csv``, ``compare.json`` and ``compare.md``, each as a whole."""
    text = io.StringIO()
    table = csv.DictWriter(text, (*KEYS, *machine), lineterminator="\n")
    table.writeheader()
    table.writerows(row | machine for row in rows)
    write(out / "compare.csv", text.getvalue())
    write(
        out / "compare.json", json.dumps({"machine": machine, "rows": [_plain(row) for row in rows]}, indent=1) + "\n"
    )
    write(out / "compare.md", "\n".join(markdown(rows, machine)) + "\n")


def markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> Iterator[str]:
    """Lines of the page: a table for each work, dtype and size."""
    yield ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    for _, group in groupby(rows, key=lambda row: [row[key] for key in ("preset", "work", "dtype", *SIZES)]):
        yield from section(list(group))


def section(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of one table."""
    first = rows[0]
    yield f"\n{WORKS[first['work']].summary}; {first['dtype']}, {Sizes(*(first[key] for key in SIZES))}\n"
    yield line(HEADER)
    yield line(["---"] * len(HEADER))
    for row in rows:
        remark = row["note"] if row["status"] == "ok" else f"**{row['status']}**: {row['note']}".rstrip(": ")
        yield line([row["implementation"], *_cells(row), remark.replace("|", "\\|")])


def _cells(row: dict[str, Any]) -> list[str]:
    spread = f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f}" if "p10_ms" in row else ""
    workspace = row.get("workspace_bytes")
    numbers = [_number(row, "median_ms", ".1f"), spread, _number(row, "tflops", ".3g"), _number(row, "of_floor", ".2f")]
    memory = [_number(row, "of_eager", ".2f"), "" if workspace is None else f"{workspace / 2**20:.0f}"]
    return numbers + memory + [_number(row, f"{key}_error", ".1e") for key in ("value", "hidden", "weight")]


def _number(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else format(value, form)


def line(cells: Any) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
