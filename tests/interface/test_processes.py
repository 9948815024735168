"""Threads, worker processes, and runs that are killed."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crash
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fused_pref as fp


class Scored(Dataset):
    """Items that are scored where they are loaded."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(6, 2, 5, 8, generator=generator)
        self.weight = torch.randn(50, 8, generator=generator)
        self.labels = torch.randint(0, 50, (6, 2, 5), generator=generator)
        self.loss = fp.LinearCPOLoss(beta=0.3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Any, Tensor]:
        hidden = self.hidden[item].clone().requires_grad_()
        output = self.loss(hidden, self.weight, self.labels[item])
        output.loss.backward()
        return tuple(value.detach() for value in output if value is not None), hidden.grad


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """A loss runs in workers, whether they are copies of this process or were sent everything."""
    data = Scored()
    expected = [data[item] for item in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2 if start == "fork" else 1, multiprocessing_context=start)
    for (values, gradient), (truth, slope) in zip(loader, expected, strict=True):
        torch.testing.assert_close(values, truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-7)


def test_outputs_go_through_a_pipe() -> None:
    """What a worker gives back is whole: fields, dtypes and metrics."""
    data = Scored()
    output = fp.linear_cpo_loss(data.hidden[0], data.weight, data.labels[0])
    sent = pickle.loads(pickle.dumps(output))
    assert type(sent) is type(output)
    assert all(torch.equal(a, b) for a, b in zip(sent, output, strict=True) if a is not None)
    assert sent.metrics().keys() == output.metrics().keys()


def test_threads() -> None:
    """Two models in two threads have the bits that each has alone; :func:`fused_pref.checks` is a thread's own."""
    together = threading.Barrier(2)

    def train(seed: int, barrier: threading.Barrier | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(70, 8, generator=generator).requires_grad_()
        shift = fp.RewardShift("running_mean")
        seen = []
        for _ in range(20):
            hidden = torch.randn(4, 6, 8, generator=generator).requires_grad_()
            labels = torch.randint(0, 70, (4, 6), generator=generator)
            desirable = torch.arange(4) % 2 == 0
            if barrier is not None:
                barrier.wait(60)
            output = fp.linear_bco_loss(hidden, weight, labels, desirable, torch.full((4,), -20.0), delta=shift)
            output.loss.backward()
            seen += [output.loss.detach(), hidden.grad]
        return [*seen, weight.grad, shift.mean]

    def bad(checked: bool) -> bool:
        labels = torch.full((2, 3), 99)
        if not checked:
            together.wait(60)
            return bool(fp.token_logps(torch.zeros(2, 3, 5), labels).isnan().any())
        with fp.checks():
            together.wait(60)
            with pytest.raises(ValueError, match="labels must be"):
                fp.token_logps(torch.zeros(2, 3, 5), labels)
        return True

    alone = [train(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train, seed, together) for seed in (0, 1)]
        for ours, theirs in zip(both, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.result(), theirs, strict=True))
        checked, unchecked = pool.submit(bad, True), pool.submit(bad, False)
        assert checked.result()
        assert unchecked.result()


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """Killed in a backward and resumed from the last checkpoint: weight, δ and counts are those of a run in one go."""
    path = tmp_path / "checkpoint.pt"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join((str(root), *filter(None, [os.environ.get("PYTHONPATH")])))
    killed = subprocess.run(
        [sys.executable, crash.__file__, str(path), "3"], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 3
    resumed = crash.train(path)
    whole = crash.train(tmp_path / "whole.pt")
    assert resumed.keys() == whole.keys()
    assert all(resumed[f"of {update}.delta.count"].sum() > 0 for update in crash.UPDATES)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
