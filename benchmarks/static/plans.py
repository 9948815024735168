"""The plans of the linear head: predicted time and workspace, beside what was measured where there is any."""

import json
from pathlib import Path
from typing import Any

import fused_pref as fp
from benchmarks.compare.run import OK
from benchmarks.static.gpus import GPUS, table
from fused_pref.cli.usage import UsageError
from fused_pref.testing.problems import WORKS

TOKENS, SEQUENCES = 8192, 16
SHAPES = ((4096, 151936), (4096, 128256), (2304, 256000), (1024, 128256))
# (work, bytes of workspace allowed): None is the default, of the usual card of an architecture.
ASKED = (("cpo", None), ("cpo", 3 << 30), ("cpo", 1 << 30), ("cpo", 512 << 20), ("bco", None), ("frozen", None),
         ("logps", None))  # fmt: skip
HEADER = [
    "work", "GPU", "D", "V", "budget, MiB", "plan", "products", "workspace, MiB", "predicted, ms", "of the floor",
    "measured, ms", "of the floor", "workspace, MiB",
]  # fmt: skip
INTRODUCTION = f"""
N = {TOKENS} in {SEQUENCES} sequences, bf16. The plan is the one that a call takes on that GPU; its time is the
planner's model: products at the rate above and no faster than memory, passes over memory, and the epilogues of the
fused products as predicted above. The floor is the products that cannot be spared, alone: 3 for CPO and BCO, 2 for a
frozen head, 1 for log-probs. Measured figures are those of `fused_pref` in a `compare.json`.
"""


def page(targets: list[str], measured: list[Path]) -> str:
    """What is assumed, and the table."""
    found = load(measured)
    rows = [
        _row(work, budget, target, shape, found)
        for work, budget in ASKED
        for shape in SHAPES
        for target in targets
        if (budget is None or work != "cpo" or shape == SHAPES[0])
    ]
    return INTRODUCTION + "\n" + table(HEADER, rows)


def _row(
    work: str, budget: int | None, target: str, shape: tuple[int, int], found: dict[Any, dict[str, Any]]
) -> list[str]:
    gradients = WORKS[work].gradients
    objective = work if work in ("cpo", "bco", "logps") else "cpo"
    hidden, vocab = shape
    common: dict[str, Any] = {"tokens": TOKENS, "hidden": hidden, "vocab": vocab, "sequences": SEQUENCES}
    options = {"device": target, "gradients": gradients, "memory_budget": budget}
    try:
        explanation = fp.explain(objective=objective, **common, **options)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        name = f"none: it needs {-(-least // 2**20)}"
        return [work, _gpu(target), f"{hidden}", f"{vocab}", _mebibytes(budget), name, *[""] * 7]
    plan, device = explanation.plan, explanation.problem.device
    floor = 2.0 * WORKS[work].products * TOKENS * hidden * vocab / device.rates[2]
    # Only the default budget is what `compare` measures.
    row = found.get((target, work, hidden, vocab)) if budget is None else None
    here = (
        ["not measured", "", ""]
        if row is None
        else [f"{row['median_ms']:.1f}", f"{row['of_floor']:.2f}", _mebibytes(row["workspace_bytes"])]
    )
    return [
        work, _gpu(target), f"{hidden}", f"{vocab}", "default" if budget is None else _mebibytes(budget),
        f"{plan.name}, fused" if plan.fused else plan.name, f"{plan.products:.2f}", _mebibytes(plan.workspace),
        f"{1e3 * plan.seconds:.1f}", f"{plan.seconds / floor:.2f}", *here,
    ]  # fmt: skip


def load(paths: list[Path]) -> dict[Any, dict[str, Any]]:
    """Rows of this library by (architecture, work, D, V), of the sizes that are predicted.

    Raises:
        UsageError: a file that is not what ``compare --out`` writes.
    """
    found = {}
    for path in paths:
        try:
            results = json.loads(path.read_text())
            architecture = results["machine"]["architecture"]
            rows = [row for row in results["rows"] if row["implementation"] == "fused_pref" and row["status"] == OK]
            for row in rows:
                whole = row["tokens"] == TOKENS == row["sequences"] * row["length"] and row["dtype"] == "bfloat16"
                if whole and row["sequences"] == SEQUENCES and "of_floor" in row and row["logits"] == "random":
                    found[architecture, row["work"], row["features"], row["vocabulary"]] = row
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--measured must be a compare.json; got {path} ({error})") from error
    return found


def _gpu(target: str) -> str:
    return f"{GPUS[target].name} ({target})"


def _mebibytes(number: float | None) -> str:
    return "" if number is None else f"{number / 2**20:.0f}"
