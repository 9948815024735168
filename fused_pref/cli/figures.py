"""Figures as files: an opaque light ground, text as text, the same bytes every time. Needs matplotlib (``bench``)."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_pref import validate
from fused_pref.cli import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# Of Okabe and Ito, told apart by the colour-blind too.
BLUE, SKY, ORANGE, RED, GREEN, GREY = "#0072b2", "#7fc4ee", "#e69f00", "#d55e00", "#009e73", "#c8c8c8"
INK, GROUND = "#222222", "#ffffff"
STYLE: dict[Any, Any] = {
    "figure.facecolor": GROUND, "savefig.facecolor": GROUND, "axes.facecolor": GROUND, "font.size": 10.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6, "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "fused_pref",
}  # fmt: skip
METADATA = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
DPI = 130


def check(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that no figure can be written to, before anything is computed for it.

    Raises:
        ValueError, TypeError: its name does not end in one of :data:`SUFFIXES`, or is none.
        ModuleNotFoundError: matplotlib is not installed.
    """
    expected = f"the name of a file that ends in {' or '.join(SUFFIXES)}"
    if not isinstance(path, str | os.PathLike):
        raise validate.fail("path", expected, path, TypeError)
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise validate.fail("path", expected, str(path))
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a plot needs matplotlib: pip install "fused-pref[bench]"', name="matplotlib"
        ) from error
    return path


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], width: float, height: float) -> "Iterator[Figure]":
    """An empty figure of so many inches, whatever the user's settings; written, as a whole, when the block ends.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: see :func:`check`.
        OSError: the file cannot be written; nothing is left behind.
    """
    path = check(path)
    import matplotlib as mpl
    from matplotlib import style
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with style.context("default"), mpl.rc_context(STYLE):
        drawn = Figure((width, height), layout="constrained")
        yield drawn
        drawn.savefig(content, format=path.suffix[1:], dpi=DPI, metadata=METADATA[path.suffix])
    files.replace(path, content.getvalue())
