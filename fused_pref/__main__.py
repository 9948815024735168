"""``python -m fused_pref COMMAND``: finds the command and reports what its user did wrong."""

import argparse
import importlib
import sys
from typing import NoReturn

from fused_pref.usage import UsageError

# command: (module with add_arguments(parser) and run(args) -> exit status, what it does). Only the chosen one is
# imported.
COMMANDS = {
    "demo": ("fused_pref.demo.cli", "preference-train a small language model with a vocabulary of 131,072"),
    "doctor": ("fused_pref.doctor", "say which backend is used on this machine and check it against the reference"),
    "explain": ("fused_pref.explanation", "print the plan that a call of the linear head would take, and its cost"),
    "kernels": ("fused_pref.kernels.report", "compile every kernel, without a GPU, and report what the code uses"),
}


class Parser(argparse.ArgumentParser):
    """Reports a bad option as one line."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to :func:`main`."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run a command line, ``sys.argv`` by default.

    Returns:
        Exit status: that of the command, 2 for an error of the user's, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m fused_pref", description="Memory-efficient CPO, BCO and DPO losses.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except UsageError as error:
        print(f"fused_pref: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused_pref: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
