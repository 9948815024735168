"""``python -m benchmarks static``: predictions for GPUs that need not be there."""

import argparse
from pathlib import Path

from fused_pref.cli.usage import UsageError

PARTS = {
    "kernels": "Every kernel: what its code uses",
    "logits": "Logits kernels: roofline",
    "order": "Fused products of the linear head: order of tiles",
    "head": "Fused products of the linear head: roofline",
    "loops": "Fused products of the linear head: two loops over tiles",
    "plans": "Plans of the linear head",
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all of them")
    parser.add_argument(
        "--measured", nargs="+", type=Path, default=[], metavar="FILE", help="compare.json to stand beside the plans"
    )


def run(args: argparse.Namespace) -> int:
    """Print the page.

    Raises:
        UsageError: nothing can be compiled here.
    """
    from fused_pref.cli.kernels.report import compile_obstacle

    obstacle = compile_obstacle()
    if obstacle:
        raise UsageError(obstacle)
    import triton

    from benchmarks.static import gpus, head, kernels, logits, loops, order, plans

    plans.load(args.measured)
    print("# Predictions from compiled code, not measured\n")
    print(f"Written by `python -m benchmarks static`, compiled by Triton {triton.__version__}. Assumed of the GPUs:\n")
    print(gpus.assumptions())
    for part in args.parts:
        print(f"\n## {PARTS[part]}")
        if part == "plans":
            print(plans.page(args.targets, args.measured), flush=True)
        else:
            print(
                {"kernels": kernels, "logits": logits, "order": order, "head": head, "loops": loops}[part].page(
                    args.targets
                ),
                flush=True,
            )
    return 0
