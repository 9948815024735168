"""Plots of the rows: time and memory against what a preset varies, and the error of every implementation."""

from pathlib import Path
from typing import Any

from benchmarks.compare.presets import PRESETS

AXES = {"N": "tokens", "V": "vocabulary", "D": "features"}
PANELS = (("median_ms", 1.0, "time, ms"), ("workspace_bytes", 2.0**-20, "workspace beyond gradients, MiB"))


def draw(rows: list[dict[str, Any]], out: Path) -> list[Path]:
    """Write every plot that the rows allow as PNG and SVG.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    rows = [row for row in rows if "median_ms" in row]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    written = []
    for preset, work, dtype in dict.fromkeys((row["preset"], row["work"], row["dtype"]) for row in rows):
        axis = PRESETS[preset].axis if preset in PRESETS else None
        if axis is not None:
            own = [row for row in rows if (row["preset"], row["work"], row["dtype"]) == (preset, work, dtype)]
            written += _sweep(own, axis, f"{work}, {dtype}", colours, out / f"{preset}-{work}-{dtype}")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype and "hidden_error" in row]
        if own:
            written += _errors(own, dtype, colours, out / f"error-{dtype}")
    return written


def _sweep(rows: list[dict[str, Any]], axis: str, title: str, colours: dict[str, str], path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, (key, unit, label) in zip(panels, PANELS, strict=True):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = sorted(
                (row[AXES[axis]], row[key] * unit) for row in rows if row["implementation"] == name and row.get(key)
            )
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title)
    return _write(figure, path)


def _errors(rows: list[dict[str, Any]], dtype: str, colours: dict[str, str], path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for marker, key, label in (("o", "hidden_error", "dh"), ("x", "weight_error", "dW")):
        points = [(row["implementation"], row[key], colours[row["implementation"]]) for row in rows if row.get(key)]
        if points:
            names, errors, own = zip(*points, strict=True)
            panel.scatter(names, errors, c=own, marker=marker, label=label)
    panel.set(yscale="log", ylabel="gradient error against float64", title=dtype)
    panel.grid(alpha=0.3)
    panel.legend()
    panel.tick_params(axis="x", rotation=30)
    return _write(figure, path)


def _write(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for each in paths:
        figure.savefig(each)
    plt.close(figure)
    return paths
