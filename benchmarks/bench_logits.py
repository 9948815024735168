"""The operations on materialised logits: time, bytes moved, and both against the floor.

The floor is one read of the logits for a forward, and two reads and one write for a forward and a backward.
"""

from typing import Any

import pytest
import torch

from benchmarks.logits import Batch, Implementation
from benchmarks.measure import copy_seconds, finish
from benchmarks.traffic import traffic

ROUNDS = 5


def test_operation(
    operation: str,
    dtype: str,
    backward: bool,
    implementation: Implementation,
    batch: Batch,
    rows: list[dict[str, Any]],
    benchmark: Any,
) -> None:
    """One operation by one implementation."""
    device = batch.logits.device.type
    obstacle = implementation.obstacle(device)
    if obstacle:
        pytest.skip(obstacle)
    call = implementation.call(operation)

    def step() -> None:
        value = call(batch)
        if backward:
            torch.autograd.grad(value, batch.logits)
        finish(device)

    facts = {
        "operation": operation,
        "implementation": implementation.name,
        "pass": "forward+backward" if backward else "forward",
        "dtype": dtype,
        "shape": list(batch.logits.shape),
        "moved_bytes": None if implementation.opaque else traffic(step),
        "floor_bytes": batch.nbytes * (3 if backward else 1),
    }
    facts["copy_seconds"] = copy_seconds(facts["floor_bytes"], device)
    benchmark.group = f"{operation} {dtype} {facts['pass']}"
    benchmark.extra_info.update(facts)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["time_over_copy"] = seconds / facts["copy_seconds"]
        rows.append({**facts, "seconds": seconds})
