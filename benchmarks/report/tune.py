"""The search for launch configurations over the steps that users take; prints a table, and keeps what is fastest."""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch

import fused_pref as fp
from fused_pref.cli import tune

SHAPES = ((16, 512, 4096, 128_256), (16, 512, 1024, 128_256))


def steps(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and step: the loss of logits, the linear head, and its log-probs alone."""
    sequences, positions, features, vocabulary = shape
    labels = torch.randint(0, vocabulary, (sequences, positions), device=device)
    options = {"device": device, "dtype": dtype}
    hidden = torch.randn(sequences, positions, features, requires_grad=True, **options)
    weight = (torch.randn(vocabulary, features, **options) * features**-0.5).requires_grad_()
    logits = torch.randn(sequences, positions, vocabulary, requires_grad=True, **options)
    yield "linear CPO", lambda: fp.linear_cpo_loss(hidden, weight, labels, backend="triton").loss.backward()
    yield "log-probs", lambda: fp.linear_sequence_logps(hidden.detach(), weight.detach(), labels, backend="triton")
    yield "CPO of logits", lambda: fp.cpo_loss(logits, labels, backend="triton").loss.backward()


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default=None, metavar="SxTxDxV", help="default: two of the size of a training step")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    shapes = SHAPES if args.shape is None else (tuple(map(int, args.shape.split("x"))),)
    for shape in shapes:
        for name, step in steps(args.device, shape, getattr(torch, args.dtype)):
            print(
                f"\n{name}, {'x'.join(map(str, shape))}, {args.dtype}\n\n| kernel | configuration | ms |\n|---|---|---|"
            )
            for key, timings in itertools.groupby(tune.search(step), key=lambda timing: timing.key):
                for timing in sorted(timings, key=lambda timing: timing.milliseconds):
                    print(f"| {key} | {timing.config} | {timing.milliseconds:.3f} |")


if __name__ == "__main__":
    main()
