"""Pictures of plans: what they show and say, the same bytes every time, and nothing left behind where they fail."""

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import fused_pref as fp
from fused_pref.__main__ import main
from fused_pref.cli import figures, picture
from fused_pref.cli.explanation import bytes_text

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("bfloat16_products")
GPU = {"model": "llama-3-8b", "device": "sm_90"}
SMALL = {"hidden": 64, "vocab": 1000, "device": "cpu", "tokens": 96, "sequences": 8}
# keywords, what the picture says beside the explanation
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "logprob, fused": ({**GPU, "gradients": ()}, ("plan logprob, fused, on gpu", picture.NEVER)),
    "logprob": (
        {**GPU, "gradients": (), "dtype": "float32", "device": "cpu", "memory_budget": 2**25},
        (
            "in 8 groups of at most 1,024",
            "in 63 slices of at most 2,048",
            "at work at a time: 1,024 x 2,048 logits, 8.0 MiB",
        ),
    ),
    "frozen_head": (
        {**GPU, "memory_budget": 1002 << 20, "gradients": ("hidden",)},
        ("in 4 groups of at most 2,048", picture.ONCE, "501.0 MiB"),
    ),
    "grouped": ({**GPU, "memory_budget": 2**33}, (picture.ONCE, "8,192 x 128,256 logits, 1.96 GiB", "not cut")),
    "grouped, in parts": (
        {**GPU, "device": "cpu", "dtype": "float32", "memory_budget": 3 * 2**30},
        ("in 8 groups of at most 1,024", "V = 128,256", "N = 8,192"),
    ),
    "vocab_major": (
        {"model": "qwen2.5-0.5b", "device": "cpu", "tokens": 4096},
        (f"{picture.KEPT}: 5 of 46 slices, 130.0 MiB", picture.AGAIN, "at work at a time: 4,096 x 3,328 logits"),
    ),
    "vocab_major, all kept": ({**SMALL, "objective": "bco"}, (f"{picture.KEPT}: 1 of 1 slices, 0.2 MiB",)),
    "vocab_major, fused": (
        {**GPU, "memory_budget": 1400 << 20},
        (f"{picture.KEPT}: 1 of 8 slices, 504.0 MiB", picture.AGAIN, "252.0 MiB"),
    ),
    "skipping": ({**GPU, "skip_mass": 2**-9}, (picture.NEEDED, "in 32 slices of at most 4,096", "64.0 MiB")),
    "many groups": (
        {**GPU, "gradients": (), "device": "cpu", "tokens": 65536, "memory_budget": 2**21},
        ("in 128 groups of at most 512", picture.ONCE),
    ),
    "no token": ({**GPU, "tokens": 0}, ("no scored token, no logits", "N = 0")),
    "one of each": ({"hidden": 1, "vocab": 1, "tokens": 1, "device": "cpu", "sequences": 2}, ("N = 1", "V = 1")),
    "huge": ({**GPU, "tokens": 10**9, "memory_budget": 2**62, "gradients": ()}, ("N = 1,000,000,000",)),
}


def said(path: Path) -> str:
    """The text of an SVG."""
    return " ".join("".join(element.itertext()) for element in ElementTree.parse(path).iter() if "text" in element.tag)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every text of what is saved, and its box; at last that of the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    boxes: list[tuple[str, Any]] = []
    save = Figure.savefig

    def look(self: Figure, *arguments: Any, **keywords: Any) -> None:
        save(self, *arguments, **keywords)
        canvas = FigureCanvasAgg(self)
        canvas.draw()
        texts = [text for text in self.findobj(Text) if text.get_text().strip() and text.get_visible()]
        boxes.extend((text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts)
        boxes.append(("", self.bbox))

    monkeypatch.setattr(Figure, "savefig", look)
    return boxes


def apart(placed: list[tuple[str, Any]]) -> None:
    """Nothing is clipped, and no texts overlap."""
    *texts, (_, whole) = placed
    for number, (text, box) in enumerate(texts):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
        for other, beside in texts[:number]:
            assert not box.overlaps(beside), (text, other)


@pytest.mark.parametrize("name", CASES)
def test_picture_of_a_plan(name: str, tmp_path: Path, placed: list[tuple[str, Any]]) -> None:
    keywords, parts = CASES[name]
    explanation = fp.explain(**keywords)
    picture.draw(explanation, tmp_path / "plan.svg")
    text = said(tmp_path / "plan.svg")
    sizes, plan = str(explanation).splitlines()[:2]
    held = sum(explanation.held.values())
    ours = bytes_text(held + explanation.peak_bytes)
    eager = bytes_text(held - explanation.held["gradients"] + explanation.eager_bytes)
    amounts = {**explanation.held, "workspace": explanation.peak_bytes, **explanation.eager_parts}
    labels = [f"{part}: {bytes_text(size)}" for part, size in amounts.items()]
    last = f"{len(explanation.steps)}. {explanation.steps[-1]}"[:40]
    for part in (sizes, plan, last, f">= {eager}", ours, "not measured", *labels, *parts):
        assert part in text
    assert len(placed) > 9
    apart(placed)
    assert (tmp_path / "plan.svg").stat().st_size < 60_000


def test_the_parts_are_to_scale(tmp_path: Path) -> None:
    """Groups of whole pairs end where their tokens do, and kept slices end where the others begin."""
    explanation = fp.explain(**CASES["grouped, in parts"][0])
    rows, columns = picture.cuts(explanation)
    assert rows.edges == tuple(range(0, 8193, 1024))
    assert (columns.count, columns.edges) == (1, (0, 128256))
    rows, columns = picture.cuts(fp.explain(**CASES["vocab_major"][0]))
    assert rows.edges == (0, 4096)
    assert columns.edges[:3] == (0, 3328, 6656)
    assert columns.edges[-1] == 151936
    assert len(columns.edges) == columns.count + 1 == 47
    uneven = picture.cuts(fp.explain(**{**SMALL, "tokens": 98, "objective": "cpo"}))[0]
    assert uneven.edges[-1] == 98
    assert picture.cuts(fp.explain(**CASES["huge"][0]))[1].edges == (0, 128256)
    many = picture.cuts(fp.explain(**CASES["many groups"][0]))
    assert (many[0].count, many[0].edges) == (128, ())
    assert (many[1].count, many[1].edges) == (167, ())


def test_held_bytes() -> None:
    explanation = fp.explain(hidden=8, vocab=100, tokens=6, positions=10, sequences=2, dtype="bfloat16")
    assert explanation.held == {"hidden states": 160, "weight": 1600, "gradients": 1760}
    assert explanation.eager_parts == dict.fromkeys(("logits", "log-softmax", "gradient of the logits"), 2000)
    few = fp.explain(hidden=8, vocab=100, tokens=6, sequences=2, gradients=("weight", "bias"), dtype="float32")
    assert few.held["gradients"] == 3200 + 400
    none = fp.explain(hidden=8, vocab=100, tokens=6, sequences=2, gradients=())
    assert none.held["gradients"] == 0
    assert list(none.eager_parts) == ["logits", "log-softmax"]


def test_same_bytes_whatever_the_settings(tmp_path: Path) -> None:
    import matplotlib as mpl

    explanation = fp.explain(**GPU)
    picture.draw(explanation, tmp_path / "one.svg")
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "figure.facecolor": "black"}):
        picture.draw(explanation, str(tmp_path / "two.svg"))
        assert mpl.rcParams["font.size"] == 30
    one, two = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "two"))
    assert one == two
    assert "<dc:date>" not in one
    # The ground is opaque, so that the page behind may be dark.
    assert re.search(rf'id="patch_1".*?fill: {figures.GROUND}', one, re.S)


@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_command(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"plan{suffix}"
    path.write_text("another file")
    arguments = ["explain", "--model", "phi-4", "--device", "sm_90"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, "--plot", str(path)]) == 0
    assert capsys.readouterr() == (printed, "")
    assert path.read_bytes().startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[suffix])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plan", "path must be the name of a file that ends in .svg or .png; got 'plan'"),
        ("", "ends in .svg or .png; got '.'"),
        (".svg", "ends in .svg or .png; got '.svg'"),
        ("plan.pdf", "ends in .svg or .png; got 'plan.pdf'"),
        ("plan.SVG", "ends in .svg or .png; got 'plan.SVG'"),
        ("plan.svg/x", "ends in .svg or .png"),
        ("missing/plan.svg", "cannot write 'missing/plan.svg': No such file or directory"),
        ("file/plan.png", "cannot write 'file/plan.png': Not a directory"),
        ("folder.svg", "cannot write 'folder.svg': Is a directory"),
        ("x" * 300 + ".svg", "File name too long"),
        ("a\0b.svg", "null"),
        ("a\0b/c.svg", "null"),
    ],
)
def test_files_that_cannot_be_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    assert main(["explain", "--model", "phi-4", "--device", "cpu", "--plot", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused_pref: argument --plot: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder.svg"]


def test_what_is_no_explanation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"explanation must be an Explanation, as .*; got 3"):
        picture.draw(3, tmp_path / "plan.svg")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"'[^']*missing/plan.svg'"):
        picture.draw(fp.explain(**GPU), tmp_path / "missing/plan.svg")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    (tmp_path / "plan.svg").write_text("first")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        picture.draw(fp.explain(**GPU), tmp_path / "plan.svg")
    assert [each.name for each in tmp_path.iterdir()] == ["plan.svg"]
    assert (tmp_path / "plan.svg").read_text() == "first"


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["explain", "--model", "phi-4", "--device", "cpu", "--plot", str(tmp_path / "plan.svg")]) == 2
    message = 'fused_pref: argument --plot: a plot needs matplotlib: pip install "fused-pref[bench]"\n'
    assert capsys.readouterr() == ("", message)
    assert list(tmp_path.iterdir()) == []
    assert main(["explain", "--model", "phi-4", "--device", "cpu"]) == 0


@pytest.mark.parametrize("bad", [3, None, b"plan.svg"])
def test_paths_that_are_none(bad: Any) -> None:
    with pytest.raises(TypeError, match="path must be"):
        picture.draw(fp.explain(**GPU), bad)
