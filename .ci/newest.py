"""The core of the suite with the newest PyTorch that the registry serves and the Triton that it brings.

Upgrades PyTorch in the environment that runs this, which is a throwaway one, and leaves all else there. Versions up to
those of ``newest.txt`` must pass. Of newer ones a failure is reported only, so that a release alone fails no change;
when they pass, raise the file.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RECORD = Path(__file__).with_name("newest.txt")
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
TESTS = [
    "tests/ops/test_kernels_compiled.py", "tests/ops/test_backend.py", "tests/ops/test_kernels.py",
    "tests/cli/test_cli.py", "tests/interface/test_compile.py",
    "tests/head/test_linear.py::test_objectives", "tests/head/test_linear.py::test_packed",
    "tests/losses/test_logits.py::test_cpo", "tests/losses/test_logits.py::test_dpo",
    "tests/losses/test_logits.py::test_bco", "tests/losses/test_logits.py::test_building_blocks",
]  # fmt: skip


def recorded(text: str) -> dict[str, str]:
    """Versions by package from lines ``package==version``."""
    return dict(line.split("==") for line in text.split())


def ahead(installed: dict[str, str], passed: dict[str, str]) -> list[str]:
    """Packages that are newer than those that passed; a build suffix such as ``+cu130`` does not count."""

    def key(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())

    return [f"{name} {installed[name]}" for name in passed if key(installed[name]) > key(passed[name])]


def main() -> int:
    """0 if the tests pass or run with versions newer than the recorded ones, else 1."""
    passed = recorded(RECORD.read_text(encoding="utf-8"))
    if subprocess.run([*PIP, "--upgrade", "torch"], check=False).returncode:
        print("REPORT: the newest PyTorch cannot be installed; going on with the recorded one", flush=True)
        subprocess.run([*PIP, f"torch=={passed['torch']}"], check=True)
    installed = {name: version(name) for name in passed}
    print("newest:", ", ".join(f"{name} {number}" for name, number in installed.items()), flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *TESTS]
    failed = subprocess.run(tests, check=False).returncode != 0
    newer = ahead(installed, passed)
    if newer:
        print(f"REPORT: {', '.join(newer)}: {'a test fails' if failed else 'passes; raise .ci/newest.txt'}")
    return int(failed and not newer)


if __name__ == "__main__":
    sys.exit(main())
