"""Command lines of the form ``python -m PACKAGE COMMAND``: find the command, and report what its user did wrong."""

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


class UsageError(Exception):
    """A bad option, file or installation; the command line prints the message as one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """Reports a bad option as one line, and keeps the lines of what follows the options in a help text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Hand the message to :func:`run_command`."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def count(text: str, least: int = 1, others: str = "") -> int:
    """The type of an option that is an integer of at least ``least``; ``others`` is what else it may be."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}{others}; got {text!r}")
    return int(text)


def run_command(
    package: str,
    description: str,
    commands: Mapping[str, tuple[str, str]],
    argv: list[str] | None = None,
    *,
    epilog: str | None = None,
    version: str | None = None,
) -> int:
    """Run a command line, ``sys.argv`` by default.

    Args:
        package: name of the package, as it stands in messages.
        description: what the package is, in a line.
        commands: by name, a module with ``add_arguments(parser)``, ``run(args) -> exit status`` and perhaps ``EPILOG``,
            which ends its help text, and what it does; only the chosen module is imported.
        argv: arguments after the package.
        epilog: end of the help text.
        version: what ``--version`` prints; None: no such option.

    Returns:
        Exit status: that of the command, 2 for an error of the user's, 130 when interrupted.
    """
    script = package.replace("_", "-")
    # As it was called: by the script that is installed with the package, or as a module.
    prog = script if argv is None and Path(sys.argv[0]).stem == script else f"python -m {package}"
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog=prog, description=description, epilog=epilog)
    if version is not None:
        parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in commands.items():
        command = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(command)
            command.epilog = getattr(chosen, "EPILOG", None)
            command.set_defaults(run=chosen.run)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    try:
        args = parser.parse_args(argv)
        if not hasattr(args, "run"):
            raise UsageError(f"the first argument must be a command, of {', '.join(commands)}; got {argv[0]!r}")
        return args.run(args)
    except UsageError as error:
        print(f"{package}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{package}: interrupted", file=sys.stderr)
        return 130
