"""What certified tile skipping saves on peaked logits: products, time, and the error beside its bound.

``python -m benchmarks.skipping``, about a minute on 2 cores.

The logits are those of :func:`peaked`: rows of the weight are random directions of length 1; a token's hidden state is
a sum of candidates' rows, which gives each of them a logit of about ``HEIGHT``, and noise, which gives every word a
logit of standard deviation 1. A share of the tokens has one candidate (its target), a share four (HEIGHT, HEIGHT − 1,
…, the target one of them), and the rest none: their probability is spread over the whole vocabulary.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_pref as fp
from benchmarks.measure import describe, finish

HEIGHT = 24.0
SHARES = (0.7, 0.2)


def peaked(
    tokens: int, features: int, vocabulary: int, shares: tuple[float, float] = SHARES
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, T, D), weight (V, D) and labels (2, T) of two sequences of ``tokens`` / 2, not shifted.

    Args:
        tokens: N, even; all are scored.
        features: D.
        vocabulary: V.
        shares: of the tokens with one candidate and with four.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(vocabulary, features, generator=generator), dim=1)
    hidden = torch.randn(tokens, features, generator=generator)
    candidates = torch.randint(0, vocabulary, (tokens, 4), generator=generator)
    kind = torch.rand(tokens, generator=generator)
    one, four = kind < shares[0], (kind >= shares[0]) & (kind < sum(shares))
    for place in range(4):
        chosen = (four | one) if place == 0 else four
        hidden += chosen[:, None] * (HEIGHT - place) * weight[candidates[:, place]]
    target = torch.where(four, torch.randint(0, 4, (tokens,), generator=generator), 0)
    labels = candidates.gather(1, target[:, None])[:, 0]
    return hidden.view(2, -1, features), weight, labels.view(2, -1)


def products(step: Callable[[], object], unit: int) -> float:
    """Matrix products of a step in units of 2·N·D·V operations."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / unit


def main() -> None:
    """Print a row per threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1536x1024x32768", help="NxDxV (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not (default: 5)")
    args = parser.parse_args()
    tokens, features, vocabulary = (int(size) for size in args.shape.split("x"))
    hidden, weight, labels = peaked(tokens, features, vocabulary)
    dtype = getattr(torch, args.dtype)
    h, w = (tensor.to(args.device, dtype).requires_grad_() for tensor in (hidden, weight))
    rows, labels = h.detach().flatten(0, 1), labels.to(args.device)

    def bare() -> object:
        z = rows @ w.detach().t()
        return z @ w.detach(), z.t() @ rows

    def loss(skip_mass: float | None) -> Callable[[], Any]:
        def run() -> Any:
            h.grad = w.grad = None
            output = fp.linear_cpo_loss(h, w, labels, shift=False, skip_mass=skip_mass, logits_mean=None)
            output.loss.backward()
            return output

        return run

    steps = {"bare products": bare, **{f"skip_mass={m}": loss(m) for m in (None, 0.0, 2**-12, 2**-9, 2**-6)}}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            finish(args.device)
            start = time.perf_counter()
            step()
            finish(args.device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    print(describe(args.device))
    print("| step | products, NDV | of the bare products' | time, of theirs | mass dropped, most | mean |")
    print("|---|---|---|---|---|---|")
    floor = statistics.median(seconds["bare products"])
    for name, step in steps.items():
        unit = 2 * tokens * features * vocabulary
        # Kernels that Triton launches are not counted.
        number = products(step, unit) if args.device == "cpu" else torch.nan
        mass = getattr(step(), "dropped_mass", None)
        lost = " | " if mass is None else f"{mass.max().item():.2e} | {mass.mean().item():.2e}"
        print(
            f"| {name} | {number:.2f} | {number / 3:.2f} | {statistics.median(seconds[name]) / floor:.2f} | {lost} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
