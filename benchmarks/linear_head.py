"""The linear head against eager PyTorch and the bare matrix products, alternating in one run.

``python -m benchmarks.linear_head``: the README's table on a CPU; with ``--device cuda`` on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fused_pref as fp
from benchmarks.common import finish, peak_bytes, stamp

BETA = 0.1


@dataclass(frozen=True)
class Problem:
    """S sequences of T positions, of which the first quarter is not scored."""

    hidden: Tensor  # (S, T, D), a leaf
    weight: Tensor  # (V, D), a leaf
    labels: Tensor  # (S, T)

    @classmethod
    def make(cls, sizes: Sequence[int], dtype: torch.dtype, device: str) -> "Problem":
        """Random, always the same."""
        sequences, length, features, vocabulary = sizes
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(sequences, length, features, generator=generator).to(device, dtype)
        weight = (torch.randn(vocabulary, features, generator=generator) * 0.02).to(device, dtype)
        labels = torch.randint(0, vocabulary, (sequences, length), generator=generator)
        labels[:, : length // 4] = -100
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels.to(device))

    @property
    def rows(self) -> Tensor:
        """The hidden states that are scored, (N, D)."""
        return self.hidden.detach()[:, :-1][self.labels[:, 1:] != -100]

    def clear(self) -> None:
        """Forget the gradients."""
        self.hidden.grad = self.weight.grad = None


def eager_cpo(p: Problem) -> Tensor:
    """CPO as TRL writes it: all positions projected, log-softmax of float32, a gather, and a cross-entropy."""
    logits = (p.hidden @ p.weight.t()).float()[:, :-1]
    labels = p.labels[:, 1:]
    logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (logp * (labels != -100)).sum(-1).chunk(2)
    pairs = len(chosen)
    nll = F.cross_entropy(logits[:pairs].flatten(0, 1), labels[:pairs].flatten())
    return nll - F.logsigmoid(BETA * (chosen - rejected)).mean()


def steps(p: Problem) -> dict[str, Callable[[], object]]:
    """What is timed, by name: each forward and backward."""
    rows, weight = p.rows, p.weight.detach()
    reference = torch.zeros(len(p.labels), device=rows.device)
    desirable = torch.arange(len(p.labels), device=rows.device) % 2 == 0

    def bare() -> tuple[Tensor, Tensor]:
        z = rows @ weight.t()
        return z @ weight, z.t() @ rows

    def frozen() -> None:
        fp.linear_cpo_loss(p.hidden, weight, p.labels, beta=BETA).loss.backward()

    return {
        "bare products": bare,
        "eager": lambda: eager_cpo(p).backward(),
        "linear_cpo_loss": lambda: fp.linear_cpo_loss(p.hidden, p.weight, p.labels, beta=BETA).loss.backward(),
        "frozen head": frozen,
        "linear_bco_loss, δ of the batch": lambda: fp.linear_bco_loss(
            p.hidden, p.weight, p.labels, desirable, reference, delta=fp.RewardShift().to(rows.device), beta=BETA
        ).loss.backward(),
    }


def measure(p: Problem, rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds, rounds alternating, and peak bytes beyond the inputs of each step."""
    named, device = steps(p), p.hidden.device.type
    seconds: dict[str, list[float]] = {name: [] for name in named}
    peaks = {}
    for number in tqdm(range(rounds + 1), desc=str(p.hidden.dtype), leave=False):
        for name, step in named.items():
            p.clear()
            finish(device)
            start = time.perf_counter()
            step()
            finish(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    for name, step in named.items():
        p.clear()
        peaks[name] = peak_bytes(step, device)
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in named}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8x256x1024x32768", help="SxTxDxV (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that is not (default: 7)")
    args = parser.parse_args()
    sizes = [int(size) for size in args.shape.split("x")]
    print(", ".join(f"{name} {value}" for name, value in stamp(args.device).items()))
    print("| dtype | step | ms | of the bare products | of eager | peak beyond inputs, MB |\n|---|---|---|---|---|---|")
    for dtype in args.dtypes.split(","):
        found = measure(Problem.make(sizes, getattr(torch, dtype), args.device), args.rounds)
        (bare, _), (eager, _) = found["bare products"], found["eager"]
        for name, (seconds, peak) in found.items():
            ratios = f"{seconds / bare:.2f} | {seconds / eager:.2f}"
            print(f"| {dtype} | {name} | {1e3 * seconds:.0f} | {ratios} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
