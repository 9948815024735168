"""The Markdown files of the repository: their code blocks, prose, headings and links."""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# What is not the project's own: environments, outputs and caches have names that git ignores.
OUTSIDE = {"site", "build", "dist", "fused_pref_demo"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block, and the ``text`` block that comes next: what it shows as its output."""

    language: str
    text: str
    output: str | None


def _own(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts[:-1]
    return not any(part in OUTSIDE or (part.startswith(".") and part != ".github") for part in parts)


PAGES = sorted(path for path in ROOT.rglob("*.md") if _own(path))
# What a user reads to learn the library.
MANUAL = [page for page in PAGES if page == ROOT / "README.md" or page.is_relative_to(ROOT / "docs")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(read(page))
    return [
        Block(language, text, after if kind == "text" else None)
        for (language, text), (kind, after) in itertools.pairwise([*found, ("", "")])
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))
