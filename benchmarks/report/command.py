"""``python -m benchmarks report``: everything this machine can tell within minutes.

Each section is a row of commands in processes of their own, whose output goes to a log as it comes; ``report.md`` is
written anew after each of them. A run that is cut off keeps what it has finished.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.measure import ROOT, check_device, default_device, describe, folder, progress, write
from benchmarks.report.sections import SECTIONS, Command, Context
from fused_pref.cli.usage import UsageError

# Of the time of a command, what it may plan with; the rest is for starting, and for writing what it has.
PLANNED = 0.8
# Seconds that a section may take however small its share, while there are as many.
LEAST = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: %(default)g)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Make the report; 1 if a command failed."""
    # Whoever ends this ends the command that is running, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_device(args.device)
    if not args.minutes > 0:
        raise UsageError(f"--minutes must be above 0; got {args.minutes:g}")
    folder(args.out)
    report = Report(Context(args.device, args.out.resolve()), time.monotonic() + 60 * args.minutes)
    names = [name for name in SECTIONS if name in args.sections]
    for number, name in enumerate(progress(names, "report")):
        rest = sum(SECTIONS[later].share for later in names[number:])
        report.section(name, SECTIONS[name].share / rest)
    print(f"written to {args.out}")
    return int(report.failed)


class Report:
    """What has been done so far, and the time that is left."""

    def __init__(self, context: Context, deadline: float) -> None:
        self.context, self.deadline = context, deadline
        self.failed = False
        self.lines = ["# Report", "", describe(context.device), "", "| section | command | result |", "|---|---|---|"]

    def section(self, name: str, share: float) -> None:
        """Run the commands of a section in this share of the time that is left."""
        left = self.deadline - time.monotonic()
        end = time.monotonic() + min(left, max(share * left, LEAST))
        for command in SECTIONS[name].commands(self.context):
            if isinstance(command, str):
                self.note(name, "", f"absent: {command}")
                continue
            left = end - time.monotonic()
            if left < command.least:
                self.note(
                    name, command.name, f"left out: it needs {command.least:g} s, and {max(left, 0):.0f} s are left"
                )
                continue
            self.note(name, command.name, "running", last=False)
            try:
                result = self.run(command, left)
            except KeyboardInterrupt:
                self.note(name, command.name, f"interrupted: [{command.name}.log]({command.name}.log)")
                raise
            self.note(name, command.name, result)

    def run(self, command: Command, seconds: float) -> str:
        """Run a command for at most so long; what became of it."""
        log, start = self.context.out / f"{command.name}.log", time.monotonic()
        argv = [part.replace("{seconds}", f"{PLANNED * seconds:.0f}") for part in command.argv]
        with log.open("w") as file:
            # A group of its own, so that what it starts ends with it.
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"cut off after {seconds:.0f} s: [{log.name}]({log.name})"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.failed |= status != 0
        result = "done" if status == 0 else f"**failed** with status {status}"
        return f"{result} in {time.monotonic() - start:.0f} s: [{log.name}]({log.name})"

    def note(self, section: str, command: str, result: str, *, last: bool = True) -> None:
        """Add a line to the page; one that is not the last word is replaced by the next."""
        line = f"| {section} | {command} | {result} |"
        write(self.context.out / "report.md", "\n".join([*self.lines, line]) + "\n")
        if last:
            self.lines.append(line)
            print(f"{section}: {command or ''} {result}".replace("  ", " "), flush=True)
