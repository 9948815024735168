"""``python -m fused_pref COMMAND``."""

import sys

from fused_pref import __version__
from fused_pref.cli.usage import run_command

COMMANDS = {
    "doctor": (
        "fused_pref.cli.doctor",
        "check this machine: which backend it uses, and whether results are right",
    ),
    "explain": ("fused_pref.cli.explain", "show the plan, memory and predicted time of a call, without running it"),
    "tune": ("fused_pref.cli.measure", "measure what plans follow from on this machine, and keep it"),
    "parity": ("fused_pref.cli.parity", "measure the error of every loss against float64, beside other libraries"),
    "ref-logps": ("fused_pref.cli.ref_logps", "compute the log-probs of a reference once, for trainers to read"),
    "kernels": (
        "fused_pref.cli.kernels.report",
        "compile all Triton kernels, without a GPU, and report registers",
    ),
    "demo": ("fused_pref.cli.demo.command", "train a small language model with a vocabulary of 131,072 tokens"),
}
EPILOG = """\
examples:
  %(prog)s doctor
  %(prog)s explain --model llama-3-8b --tokens 8192 --device sm_90

%(prog)s COMMAND --help lists the options of a command.
Documentation: docs/index.md in the repository; commands: docs/api/commands.md
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status of a command line, ``sys.argv`` by default."""
    description = "CPO, BCO, DPO and KTO losses for language models with large vocabularies."
    return run_command("fused_pref", description, COMMANDS, argv, epilog=EPILOG, version=f"fused_pref {__version__}")


if __name__ == "__main__":
    sys.exit(main())
