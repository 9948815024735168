#!/usr/bin/env python3
"""Set up and run from a bare clone: ``python3 dev.py demo`` or ``python3 dev.py test``.

Works with nothing but Python 3.10 or newer and pip: installs what the command needs into the active virtual
environment, or into ``.venv`` beside this file, which it makes, and then runs the command there. Arguments after the
command are passed on. PyTorch is installed only where there is none yet, at the version the tests run with.

Nothing is installed where nothing has changed: a file in the environment, ``fused-pref-dev.json``, remembers what has
been installed for which ``pyproject.toml``. Delete it to install again.
"""

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

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
    "stubs": ("dev", ["tests/helpers/stubs.py"]),
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


PROBE = """
import importlib.util, json, sys
found = [importlib.util.find_spec(name) is not None for name in ("torch", "fused_pref")]
print(json.dumps([sys.prefix, sys.version, *found]))
"""


def remembered(stamp: Path) -> dict[str, Any]:
    """What a stamp says; nothing where it is missing or damaged."""
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def install(python: Path, extra: str) -> None:
    """Install PyTorch, if missing, and this project with an extra, unless that has been done already."""
    # Not from here, where the package is found whether it is installed or not.
    probe = subprocess.run([str(python), "-c", PROBE], cwd=python.parent, check=True, stdout=subprocess.PIPE, text=True)
    prefix, version, torch, project = json.loads(probe.stdout)
    stamp = Path(prefix) / "fused-pref-dev.json"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    state = {"root": str(ROOT), "pyproject": digest, "python": version, "torch": TORCH}
    extras = remembered(stamp)
    extras = extras.get("extras", []) if state.items() <= extras.items() else []
    if torch and project and extra in extras:
        return
    # Until the installation is done there is nothing to remember.
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not torch:
        print(f"installing {TORCH}", flush=True)
        subprocess.run([*pip, TORCH], check=True)
    print(f"installing fused-pref[{extra}]", flush=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{extra}]"], check=True)
    stamp.write_text(json.dumps({**state, "extras": sorted({*extras, extra})}), encoding="utf-8")


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
