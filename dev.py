#!/usr/bin/env python3
"""Set up and run from a bare clone: ``python3 dev.py demo`` or ``python3 dev.py test``.

Works with nothing but Python 3.10 or newer and pip: installs what the command needs into the active virtual
environment, or into ``.venv`` beside this file, which it makes, and then runs the command there. Arguments after the
command are passed on. PyTorch is installed only where there is none yet, at the version the tests run with.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
# command: (extra to install, what to run)
COMMANDS = {
    "demo": ("demo", ["-m", "fused_pref", "demo"]),
    "test": ("test", ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]),
    "lint": ("dev", ["-m", "ruff", "check", "."]),
    "format": ("dev", ["-m", "ruff", "format", "--check", "."]),
    "types": ("dev", ["-m", "pyright"]),
    "docs": ("docs", ["-m", "mkdocs", "build", "--strict"]),
}


def environment() -> Path:
    """Python of the active virtual environment, else of ``.venv``, made if need be."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    active = os.environ.get("VIRTUAL_ENV")
    folder = Path(active) if active else ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making a virtual environment in {folder}", flush=True)
        venv.create(folder, with_pip=True)
    return python


def install(python: Path, extra: str) -> None:
    """Install PyTorch, if missing, and this project with an extra."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    if subprocess.run([str(python), "-c", probe], check=False).returncode:
        print(f"installing {TORCH}", flush=True)
        subprocess.run([*pip, TORCH], check=True)
    print(f"installing fused-pref[{extra}]", flush=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{extra}]"], check=True)


def main() -> int:
    """Exit status of the command."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: {Path(sys.argv[0]).name} {{{','.join(COMMANDS)}}} [arguments]", file=sys.stderr)
        return 2
    extra, command = COMMANDS[sys.argv[1]]
    python = environment()
    try:
        install(python, extra)
    except subprocess.CalledProcessError as error:
        print(f"installation failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode
    return subprocess.run([str(python), *command, *sys.argv[2:]], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
