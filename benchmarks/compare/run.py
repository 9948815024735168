"""Measure a kind of work at a size: every implementation behind a gate, then all of them in alternating rounds."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import alternate, peak_bytes, progress, quantile
from fused_pref.cli.peers import Peer, bare_products
from fused_pref.testing.parity import evaluate
from fused_pref.testing.problems import WORKS, Problem, Sizes, Work, error, truth

FLOOR = "bare products"
OK, ABSENT, RAISED, FAILS = "ok", "absent", "raised", "fails the gate"
# What a correct implementation in this dtype stays within: of the value, and of each gradient; against float64.
GATES = {
    torch.float32: {"value": 1e-4, "hidden": 1e-3, "weight": 1e-3},
    torch.bfloat16: {"value": 2e-2, "hidden": 3e-2, "weight": 3e-2},
    torch.float16: {"value": 5e-3, "hidden": 1e-2, "weight": 1e-2},
}


class Contender:
    """An implementation and its row; once it has raised, the row says so, and it does nothing more."""

    def __init__(self, row: dict[str, Any], device: str) -> None:
        self.row, self.device = row, device
        self.step: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        """Run the step."""
        self.attempt(self.step)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do it, whatever it raises: that a peer does not run is a result too."""
        if self.row["status"] == RAISED:
            return
        try:
            action()
            return
        except Exception as raised:
            lines = str(raised).strip().splitlines() or [""]
            self.row |= {"status": RAISED, "note": f"{type(raised).__name__}: {lines[0][:200]}"}
        # Only now that the exception is gone is what its frames held free.
        self.step = lambda: None
        free(self.device)

    def admit(self, step: Callable[[], dict[str, Tensor]], dtype: torch.dtype, true: dict[str, Tensor]) -> None:
        """Hold what a step computes against the truth, see its memory, and keep it for the rounds."""
        found = step()
        errors = {key: error(value, true[key]) for key, value in found.items()}
        gradients = sum(value.nbytes for key, value in found.items() if key != "value")
        del found
        passes = all(value <= GATES[dtype][key] for key, value in errors.items())
        self.row |= {"status": OK if passes else FAILS, **{f"{key}_error": value for key, value in errors.items()}}
        free(self.device)
        self.row["workspace_bytes"] = max(0, peak_bytes(step, self.device) - gradients)
        self.step = step


def measure(
    sizes: Sizes,
    dtype: torch.dtype,
    name: str,
    peers: list[Peer],
    *,
    device: str,
    rounds: int,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """Rows of a table, the floor first; their keys are in :mod:`benchmarks.compare.tables`."""
    work, problem = WORKS[name], Problem.make(sizes, dtype, device)
    contenders = admitted(work, name, problem, peers)
    free(device)
    running = {key: each for key, each in contenders.items() if each.row["status"] in (OK, FAILS)}
    times = alternate(running, rounds, device, f"{name}: rounds", deadline)
    # What raised in a round has no time.
    times = {key: seconds for key, seconds in times.items() if running[key].row["status"] != RAISED}
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    flops = 2.0 * work.products * sizes.tokens * sizes.features * sizes.vocabulary
    for key, median in medians.items():
        contenders[key].row |= {
            "median_ms": 1e3 * median,
            "p10_ms": 1e3 * quantile(times[key], 0.1),
            "p90_ms": 1e3 * quantile(times[key], 0.9),
            "rounds": len(times[key]),
            "tflops": flops / median / 1e12,
            **{f"of_{of}": median / medians[by] for of, by in (("floor", FLOOR), ("eager", "eager")) if by in medians},
        }
    common = {"work": name, "dtype": str(dtype).removeprefix("torch."), **asdict(sizes), "tokens": sizes.tokens}
    return [{**common, "implementation": key, **each.row} for key, each in contenders.items()]


def admitted(work: Work, name: str, problem: Problem, peers: list[Peer]) -> dict[str, Contender]:
    """The floor, and every implementation of this work: absent, or held against the truth."""
    device, dtype = problem.hidden.device.type, problem.hidden.dtype
    floor = Contender({"status": OK, "note": f"{work.products} products, the floor"}, device)
    floor.step = bare_products(problem.of(work.gradients))
    floor()
    contenders, true = {FLOOR: floor}, truth(work.objective, problem)
    for peer in progress([peer for peer in peers if peer.does(name, device)], f"{name}: gates"):
        obstacle = peer.obstacle(device)
        contender = Contender({"status": ABSENT if obstacle else OK, "note": obstacle or peer.note}, device)
        contenders[peer.name] = contender
        if obstacle is None:
            own = problem.of(work.gradients)

            def admit(contender: Contender = contender, peer: Peer = peer, own: Problem = own) -> None:
                contender.admit(partial(evaluate, peer.load(work.objective), own), dtype, true)

            contender.attempt(admit)
    return contenders


def free(device: str) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
