"""``python -m fused_pref explain``: print the plan that a call of the linear head would take, and draw it."""

import argparse
import inspect
from dataclasses import replace

from fused_pref.cli import figures
from fused_pref.cli.explanation import (
    DELTAS,
    DEVICES,
    DTYPES,
    GRADIENTS,
    MODELS,
    OBJECTIVES,
    bytes_text,
    explain,
    milliseconds,
)
from fused_pref.cli.picture import draw
from fused_pref.cli.usage import UsageError
from fused_pref.head.plans.planner import candidates, choose
from fused_pref.head.plans.problem import Plan

DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(explain).parameters.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of :func:`explain`, with its defaults."""
    parser.add_argument("--model", choices=sorted(MODELS), help="a model whose shapes are known")
    parser.add_argument("--tokens", type=int, help="N, scored tokens (default: %(default)s)")
    parser.add_argument("--objective", choices=OBJECTIVES, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, help="D")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--device", choices=DEVICES, help="default: an accelerator if there is one")
    parser.add_argument(
        "--sequences", type=int, help="S (default: 16, or more, so that each has at most about 2048 tokens)"
    )
    parser.add_argument("--positions", type=int, help="S·T, scored or not (default: the tokens)")
    parser.add_argument("--gradients", nargs="*", choices=GRADIENTS, help="default: hidden weight")
    parser.add_argument("--delta", choices=DELTAS, help="of BCO alone: who moves δ (default: %(default)s)")
    parser.add_argument("--memory-budget", type=int, help="bytes of workspace")
    parser.add_argument("--device-memory", type=int, help="bytes of the device, of which the default budget is 1/16")
    parser.add_argument("--skip-mass", type=float, help="probability that a token's gradient may lose")
    parser.add_argument("--plot", metavar="FILE", help=f"also draw it, as {' or '.join(figures.SUFFIXES)}")
    parser.add_argument("--all", action="store_true", help="also list what other budgets would buy")
    parser.set_defaults(**DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Print the explanation, and draw it."""
    options = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    try:
        explanation = explain(**options)
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
