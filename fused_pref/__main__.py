"""``python -m fused_pref COMMAND``."""

import sys

from fused_pref.cli.usage import run_command

COMMANDS = {
    "demo": ("fused_pref.cli.demo.command", "preference-train a small language model with a vocabulary of 131,072"),
    "doctor": ("fused_pref.cli.doctor", "say which backend is used on this machine and check it against the reference"),
    "explain": ("fused_pref.cli.explain", "print the plan that a call of the linear head would take, and its cost"),
    "parity": ("fused_pref.cli.parity", "compare every loss with float64 and with other libraries, by every plan"),
    "ref-logps": ("fused_pref.cli.ref_logps", "compute the log-probs of a reference once, for trainers to read"),
    "kernels": ("fused_pref.cli.kernels.report", "compile every kernel, without a GPU, and report what the code uses"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status of a command line, ``sys.argv`` by default."""
    return run_command("fused_pref", "Memory-efficient CPO, BCO, DPO and KTO losses.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
