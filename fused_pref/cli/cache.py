"""Small JSON files in the user's cache folder: what was measured on this machine, by key."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from fused_pref.cli import files

# Layout of the files.
VERSION = 1


def path_of(name: str) -> Path:
    """A file of the folder that ``FUSED_PREF_CACHE`` names, else of ``fused_pref`` in the user's cache folder."""
    folder = os.environ.get("FUSED_PREF_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "fused_pref")
    with contextlib.suppress(RuntimeError):  # a user without a home
        folder = Path(folder).expanduser()
    return Path(folder) / name


def read(path: Path) -> dict[str, Any] | None:
    """The entries by key; None, with a warning, if the file is not one of these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    else:
        entries = content.get("entries") if isinstance(content, dict) and content.get("version") == VERSION else None
        if isinstance(entries, dict):
            return entries
        reason = f"it is not of layout {VERSION}"
    warnings.warn(f"{path} is ignored, and not written to until it is removed: {reason}", stacklevel=2)
    return None


def add(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry in one step, so that no reader sees half of the file; one that is not ours is left alone.

    Of two processes that add at once one may lose its entry: it is found again.
    """
    entries = read(path)
    if entries is None:
        return
    text = json.dumps({"version": VERSION, "entries": {**entries, key: entry}}, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text.encode())
    except OSError as error:
        warnings.warn(f"what was measured is not kept: {error}", stacklevel=2)
