"""``python -m fused_pref explain``: print the plan that a call of the linear head would take, and draw it."""

import argparse
import inspect
from dataclasses import replace

from fused_pref.cli import constants, figures
from fused_pref.cli.explanation import (
    DELTAS,
    DEVICES,
    DTYPES,
    GRADIENTS,
    MODELS,
    OBJECTIVES,
    bytes_text,
    device_here,
    explain,
    milliseconds,
)
from fused_pref.cli.picture import draw
from fused_pref.cli.usage import UsageError
from fused_pref.head.plans.planner import candidates, choose
from fused_pref.head.plans.problem import Plan

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(explain).parameters.items()}


EPILOG = """\
Nothing is computed and no GPU is needed. Times and bytes are predictions.

examples:
  %(prog)s --model llama-3-8b --tokens 8192 --device sm_90 --all
  %(prog)s --hidden 896 --vocab 151936 --gradients hidden --plot plan.svg

See docs/plans.md for the plans, and docs/budget.md for how to choose a budget.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of :func:`explain`, with its defaults."""
    add = parser.add_argument
    models = sorted(MODELS)
    add("--model", choices=models, metavar="NAME", help=f"take D and V from a known model: {', '.join(models)}")
    add("--hidden", type=int, metavar="D", help="hidden size, without --model")
    add("--vocab", type=int, metavar="V", help="vocabulary size, without --model")
    add("--tokens", type=int, metavar="N", help="scored tokens (default: %(default)s)")
    add("--sequences", type=int, metavar="S", help="(default: 16, more where that makes each longer than 2048 tokens)")
    add("--positions", type=int, metavar="ST", help="all positions, scored or not (default: as many as tokens)")
    add("--objective", choices=OBJECTIVES, help="batch: any that couples the whole batch (default: %(default)s)")
    add("--delta", choices=DELTAS, help="BCO only: δ follows from the batch, or is known (default: %(default)s)")
    add("--gradients", nargs="*", choices=GRADIENTS, help="what needs a gradient (default: hidden weight)")
    add("--dtype", choices=DTYPES, help="dtype of hidden states and weight (default: bfloat16)")
    add("--device", choices=DEVICES, help="device or GPU architecture (default: an accelerator if there is one)")
    add("--device-memory", type=int, metavar="BYTES", help="memory of the GPU; the default budget is 1/16 of it")
    add("--memory-budget", type=int, metavar="BYTES", help="most workspace that the call may use")
    add("--skip-mass", type=float, metavar="P", help="probability that a token's gradient may lose")
    add("--all", action="store_true", help="also list the plans of other budgets")
    add("--plot", metavar="FILE", help=f"also draw the plan, as {' or '.join(figures.SUFFIXES)}")
    parser.set_defaults(**DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Print the explanation, and draw it."""
    options = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    try:
        explanation, here = explain(**options), device_here(args.device)
    except (ValueError, TypeError) as error:
        raise UsageError(error) from error
    if args.plot is not None:
        try:
            draw(explanation, args.plot)
        except (ImportError, ValueError) as error:
            raise UsageError(f"argument --plot: {error}") from error
        except OSError as error:
            raise UsageError(f"argument --plot: cannot write {args.plot!r}: {error.strerror}") from error
    print(explanation)
    if here is not None:
        print("\n".join(constants.notes(here)))
    if args.all:
        print("\nwhat a budget buys:")
        found: dict[tuple[str, float, bool], Plan] = {}
        for plan in sorted(candidates(explanation.problem), key=lambda plan: plan.workspace):
            chosen = choose(replace(explanation.problem, budget=plan.workspace))
            found[chosen.name, chosen.products, chosen.fused] = chosen
        for (name, products, fused), plan in found.items():
            form = f"{name}, fused" if fused else name
            print(
                f"  {bytes_text(plan.workspace):>12}  {form:18} {products:.2f} products, {milliseconds(plan.seconds)}"
            )
    return 0
