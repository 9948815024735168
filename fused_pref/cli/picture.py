"""The picture of a plan: the N x V logits in the parts that it works through, and its bytes beside eager's."""

import itertools
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fused_pref import validate
from fused_pref.cli import figures
from fused_pref.cli.explanation import Explanation, bytes_text

# Parts in a row that are still drawn one by one.
DRAWN = 64
# Inches, and the size of most text.
WIDTH, HEIGHT, LEFT, SMALL = 8.0, 5.6, 1.1, 8.5
# Fill and hatch of logits by what becomes of them.
ONCE, KEPT, AGAIN = "computed once", "computed once, kept for the backward", "computed again in the backward"
NEEDED, NEVER = "computed again for the tokens that need them", "never written: the product takes them in"
FILLS = {
    ONCE: (figures.SKY, ""), KEPT: (figures.BLUE, ""), AGAIN: (figures.ORANGE, ""), NEEDED: (figures.ORANGE, "//"),
    NEVER: (figures.GREY, "//"),
}  # fmt: skip
# Of the bars: what every path holds, and what it adds.
HELD, OURS, EAGER = ("#555555", "#8c8c8c", figures.GREY), (figures.BLUE,), (figures.RED, figures.ORANGE, "#f0e442")

LEGEND: dict[str, Any] = {
    "frameon": False, "borderpad": 0, "borderaxespad": 0, "fontsize": SMALL, "title_fontsize": SMALL,
    "alignment": "left",
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How an axis of the logits is cut.

    Attributes:
        length: of the axis.
        size: of the largest part.
        count: of the parts.
        edges: where parts begin, and the end; empty where they are too many to draw.
    """

    length: int
    size: int
    count: int
    edges: tuple[int, ...]

    @classmethod
    def even(cls, length: int, size: int) -> "Cut":
        """Parts of this size, the last one smaller."""
        count = -(-length // max(size, 1))
        return cls(length, size, count, (*range(0, length, max(size, 1)), length) if count <= DRAWN else ())

    def text(self, noun: str) -> str:
        """In words."""
        if self.count < 2:
            return "not cut"
        return f"in {self.count:,} {noun}s of at most {self.size:,}"


def cuts(explanation: Explanation) -> tuple[Cut, Cut]:
    """Of the rows, in the order in which the plan takes them, and of the vocabulary."""
    plan, p = explanation.plan, explanation.problem
    rows, columns = Cut.even(p.tokens, plan.rows), Cut.even(p.vocabulary, plan.columns)
    if plan.bounds:
        starts = (0, *itertools.accumulate(p.units))
        edges = tuple(starts[unit] for unit in plan.bounds)
        rows = Cut(p.tokens, plan.rows, len(edges) - 1, edges)
    return rows, columns


def fill(explanation: Explanation) -> str:
    """What becomes of the logits that are not kept."""
    plan = explanation.plan
    if plan.fused and not explanation.problem.gradients:
        return NEVER
    return {"again": AGAIN, "needed": NEEDED, "once": ONCE}[plan.logits]


def draw(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Draw a plan: the logits as it cuts them, each axis to scale, and its bytes beside those of the eager path.

    Everything is as the planner computes it, nothing is measured. Needs matplotlib: ``fused-pref[bench]``.

    Args:
        explanation: what :func:`fused_pref.explain` returned.
        path: of an SVG or PNG file; one that is there is replaced.

    Raises:
        ValueError, TypeError: no explanation, no name of a file, or one that does not end in ``.svg`` or ``.png``.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written; nothing is left behind.
    """
    if not isinstance(explanation, Explanation):
        raise validate.fail("explanation", "an Explanation, as fused_pref.explain gives it", explanation, TypeError)
    sizes, plan, *others = str(explanation).splitlines()[: 3 + len(explanation.steps)]
    title = "\n".join(textwrap.fill(text, 112, subsequent_indent="      ") for text in (plan, sizes, *others))
    with figures.figure(path, WIDTH, HEIGHT) as figure:
        figure.set_layout_engine("none")
        figure.text(0.1 / WIDTH, 1 - 0.1 / HEIGHT, title, va="top", fontsize=SMALL)
        top = HEIGHT - 0.25 - 0.15 * len(title.splitlines())
        draw_plane(_panel(figure, 2.5, top), explanation)
        draw_bars(_panel(figure, 0.8, 1.58), explanation)


def _panel(figure: Any, bottom: float, top: float) -> Any:
    return figure.add_axes((LEFT / WIDTH, bottom / HEIGHT, (WIDTH - LEFT - 0.2) / WIDTH, (top - bottom) / HEIGHT))


def draw_plane(axes: Any, explanation: Explanation) -> None:
    """The logits, each axis to scale for itself."""
    from matplotlib.patches import Patch, Rectangle

    p, plan, rest = explanation.problem, explanation.plan, fill(explanation)
    rows, columns = cuts(explanation)
    axes.set(xlim=(0, p.vocabulary), ylim=(max(p.tokens, 1), 0))
    axes.set_xticks([0, p.vocabulary], ["0", f"V = {p.vocabulary:,}"], fontsize=SMALL)
    axes.set_yticks([])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.set_xlabel(f"vocabulary, {columns.text('slice')}", labelpad=-8, fontsize=SMALL)
    axes.set_ylabel(f"N = {p.tokens:,} scored tokens,\n{rows.text('group')}", fontsize=SMALL)
    axes.yaxis.set_label_coords(-0.03, 0.5)
    if not p.tokens:
        axes.text(0.5, 0.5, "no scored token, no logits", transform=axes.transAxes, ha="center", va="center")
        return
    saved, handles = min(plan.saved * plan.columns, p.vocabulary), []
    held = f"{KEPT}: {plan.saved} of {columns.count} slices, {bytes_text(p.tokens * saved * p.logits_itemsize)}"
    for name, start, stop in ((held, 0, saved), (rest, saved, p.vocabulary)):
        if start < stop:
            colour, hatch = FILLS[KEPT if name == held else name]
            style: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": figures.GROUND, "linewidth": 0}
            axes.add_patch(Rectangle((start, 0), stop - start, p.tokens, **style))
            handles.append(Patch(label=name, **style))
    axes.vlines(columns.edges[1:-1], 0, p.tokens, color=figures.GROUND, linewidth=0.8)
    axes.hlines(rows.edges[1:-1], 0, p.vocabulary, color=figures.GROUND, linewidth=0.8)
    if rest != NEVER and saved < p.vocabulary:
        height = rows.edges[1] if rows.edges else rows.size
        width = min(columns.size, p.vocabulary - saved)
        frame: dict[str, Any] = {"fill": False, "edgecolor": figures.INK, "linewidth": 1.6}
        axes.add_patch(Rectangle((saved, 0), width, height, clip_on=False, zorder=3, **frame))
        size = bytes_text(rows.size * width * (p.itemsize if plan.fused else p.logits_itemsize))
        handles.append(Patch(label=f"at work at a time: {rows.size:,} x {width:,} logits, {size}", **frame))
    axes.figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(LEFT / WIDTH, 2.2 / HEIGHT), **LEGEND)


def draw_bars(axes: Any, explanation: Explanation) -> None:
    """What a call holds: ours and eager's, by what holds it."""
    from matplotlib.patches import Patch

    held = _coloured(explanation.held, HELD)
    inputs = [part for part in held if part[0] != "gradients"]
    own = {
        "ours": _coloured({"workspace": explanation.peak_bytes}, OURS),
        "eager": _coloured(explanation.eager_parts, EAGER),
    }
    # Eager's gradients are made when its peak is over.
    bars = [held + own["ours"], inputs + own["eager"]]
    most = max(sum(size for _, size, _ in bar) for bar in bars)
    for place, bar in enumerate(bars):
        left = 0
        for _, size, colour in bar:
            axes.barh(place, size, left=left, color=colour, height=0.7)
            left += size
        axes.text(left + 0.01 * most, place, f"{'>= ' * place}{bytes_text(left)}", va="center", fontsize=SMALL)
    axes.set(xlim=(0, 1.2 * max(most, 1)), ylim=(1.5, -0.5), xticks=[])
    axes.set_yticks([0, 1], list(own))
    axes.spines["bottom"].set_visible(False)
    columns = []
    for parts in (held, *own.values()):
        patches = [Patch(label=f"{name}: {bytes_text(size)}", color=colour) for name, size, colour in parts]
        columns += patches + [Patch(label=" ", alpha=0)] * (len(held) - len(patches))
    place = {"loc": "upper left", "bbox_to_anchor": (LEFT / WIDTH, 0.78 / HEIGHT), "ncols": 3}
    axes.figure.legend(
        handles=columns,
        title="at the peak, by the planner's accounts, not measured; eager's gradients come after its peak",
        **place,
        **LEGEND,
    )


def _coloured(sizes: Mapping[str, int], colours: tuple[str, ...]) -> list[tuple[str, int, str]]:
    return [(name, size, colour) for (name, size), colour in zip(sizes.items(), colours, strict=False)]
