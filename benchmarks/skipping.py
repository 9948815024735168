"""``python -m benchmarks skipping``: what certified tile skipping saves on peaked logits, and the mass it drops.

The logits are those of :func:`peaked`: rows of the weight are random directions of length 1; a token's hidden state is
a sum of candidates' rows, which gives each of them a logit of about ``HEIGHT``, and noise, which gives every word a
logit of standard deviation 1. A share of the tokens has one candidate (its target), a share four (HEIGHT, HEIGHT − 1,
…, the target one of them), and the rest none: their probability is spread over the whole vocabulary.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_pref as fp
from benchmarks.compare.tables import line
from benchmarks.measure import alternate, check_device, check_rounds, default_device, describe
from fused_pref.cli.peers import bare_products
from fused_pref.cli.usage import UsageError
from fused_pref.testing.problems import Problem, Sizes, parse_shape

SHAPE = "1536x1024x32768"
HEIGHT = 24.0
# Of the tokens with one candidate and with four.
SHARES = (0.7, 0.2)
MASSES = (None, 0.0, 2**-12, 2**-9, 2**-6)
BARE = "bare products"
HEADER = ("step", "products, NDV", "of the bare products'", "time, of theirs", "mass dropped, most", "mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--shape", default=SHAPE, metavar="NxDxV", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print a row for the bare products and for each threshold."""
    check_device(args.device)
    check_rounds(args.rounds)
    try:
        tokens, features, vocabulary = parse_shape(args.shape, "NxDxV", SHAPE)
    except ValueError as error:
        raise UsageError(error) from error
    problem = problem_of(Sizes(2, tokens // 2, features, vocabulary), getattr(torch, args.dtype), args.device)
    steps: dict[str, Callable[[], Any]] = {BARE: bare_products(problem)}
    steps |= {f"skip_mass={mass}": partial(loss, problem, mass) for mass in MASSES}
    unit = 2 * tokens * features * vocabulary
    # Kernels that Triton launches are not counted.
    counts = {name: products(step, unit) if args.device == "cpu" else torch.nan for name, step in steps.items()}
    dropped = {name: getattr(step(), "dropped_mass", None) for name, step in steps.items()}
    times = alternate(steps, args.rounds, args.device, "rounds")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print("\n".join([describe(args.device), line(HEADER), line(["---"] * len(HEADER))]))
    for name, mass in dropped.items():
        cells = [f"{counts[name]:.2f}", f"{counts[name] / 3:.2f}", f"{medians[name] / medians[BARE]:.2f}"]
        lost = ["", ""] if mass is None else [f"{mass.max().item():.2e}", f"{mass.mean().item():.2e}"]
        print(line([name, *cells, *lost]))
    return 0


def problem_of(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """The peaked logits of two sequences; both gradients are wanted."""
    hidden, weight, labels = peaked(sizes.tokens, sizes.features, sizes.vocabulary)
    h, w = (tensor.to(device, dtype).requires_grad_() for tensor in (hidden, weight))
    desirable = torch.tensor([True, False], device=device)
    return Problem(sizes, h, w, labels.to(device), desirable, torch.zeros(2, device=device))


def loss(problem: Problem, skip_mass: float | None) -> Any:
    """CPO's outputs, after the backward."""
    problem.hidden.grad = problem.weight.grad = None
    tensors = (problem.hidden, problem.weight, problem.labels)
    output = fp.linear_cpo_loss(*tensors, shift=False, skip_mass=skip_mass, logits_mean=None)
    output.loss.backward()
    return output


def peaked(tokens: int, features: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, T, D), weight (V, D) and labels (2, T) of two sequences of ``tokens`` / 2, not shifted.

    Args:
        tokens: N, even; all are scored.
        features: D.
        vocabulary: V.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(vocabulary, features, generator=generator), dim=1)
    hidden = torch.randn(tokens, features, generator=generator)
    candidates = torch.randint(0, vocabulary, (tokens, 4), generator=generator)
    kind = torch.rand(tokens, generator=generator)
    one, four = kind < SHARES[0], (kind >= SHARES[0]) & (kind < sum(SHARES))
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
