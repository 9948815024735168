"""``python -m benchmarks COMMAND``."""

import sys

from fused_pref.cli.usage import run_command

COMMANDS = {
    "compare": ("benchmarks.compare.command", "the linear head beside its peers and the bare products"),
    "scaling": ("benchmarks.scaling", "time per token against N, V and D, and launches per call"),
    "skipping": ("benchmarks.skipping", "what skip_mass saves on peaked logits: products, time, and the mass dropped"),
    "memory": ("benchmarks.memory", "workspace against tokens, of the linear head and its peers"),
    "trainers": ("benchmarks.trainers", "time and peak memory of a training step, against TRL's own trainers"),
    "padding": ("benchmarks.padding", "tokens a second of a training step, padded and padding-free"),
    "static": (
        "benchmarks.static.command",
        "what compiled code and the plans predict, for GPUs that need not be there",
    ),
    "replay": ("benchmarks.replay.command", "what every plan and loss launches and allocates on a GPU, without one"),
    "host": ("benchmarks.host", "what a launch costs the host, in parts, without a GPU"),
    "report": ("benchmarks.report.command", "everything this machine can tell, within minutes, kept as it is finished"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status of a command line, ``sys.argv`` by default."""
    return run_command("benchmarks", "Benchmarks of fused_pref; see benchmarks/README.md.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
