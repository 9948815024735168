"""The emulator, built by the machine's C++ compiler, and the structures that it shares with Python."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
HEADER = re.sub(r"//.*", "", (HERE / "machine.h").read_text())
# What is looked for, by its number.
KINDS = [name.replace("_", " ").lower().replace("lds", "LDS") for name in
         re.findall(r"\w+", re.findall(r"enum Kind : u32 {(.*?)}", HEADER, re.S)[0])]  # fmt: skip
TYPES: dict[str, Any] = {f"{kind[0]}{8 * size}": getattr(ctypes, f"c_{kind}{8 * size}")
                         for kind in ("uint", "int") for size in (1, 2, 4, 8)}  # fmt: skip


def structure(name: str) -> Any:
    """A structure of ``machine.h`` in terms of ctypes; pointers are addresses."""
    (body,) = re.findall(rf"^struct {name} {{(.*?)^}};", HEADER, re.M | re.S)
    fields = []
    for kind, indirect, names in re.findall(r"^ +(?:const )?(\w+)(\*?) (.+);", body, re.M):
        for pointer, field, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
            whole = ctypes.c_void_p if pointer or indirect else TYPES[kind]
            fields.append((field, whole * int(length) if length else whole))
    return TYPES.setdefault(name, type(name, (ctypes.Structure,), {"_fields_": fields}))


def compiler() -> str | None:
    """The environment's C++ compiler, else the machine's; None where it is not there."""
    return next(filter(shutil.which, os.environ.get("CXX", "clang++ g++ c++").split()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, built once for each state of its source, in the user's cache."""
    flags = "-std=c++20 -O2 -march=native -ffp-contract=off -fno-math-errno -fno-strict-aliasing -shared -fPIC"
    command = [compiler() or os.environ.get("CXX") or "c++", *flags.split()]
    sources = b"".join(path.read_bytes() for pattern in ("*.h", "*.cpp") for path in sorted(HERE.glob(pattern)))
    key = hashlib.sha256(sources + repr(command).encode()).hexdigest()[:16]
    built = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"fused_pref/gfx942-{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run([*command, "-o", str(partial), str(HERE / "machine.cpp")], check=True)
            partial.replace(built)
        except (OSError, subprocess.CalledProcessError) as e:
            raise pytest.UsageError(f"CXX must be a C++20 compiler that builds {HERE}/machine.cpp; got {e}") from e
    return ctypes.CDLL(str(built))
