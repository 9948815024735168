"""The Markdown files of the repository: their code blocks, prose, headings and links."""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
# What is not the project's own: environments, outputs and caches have names that git ignores.
OUTSIDE = {"site", "build", "dist", "fused_pref_demo"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
# What the reference makes headings of.
DOCUMENTED = re.compile(r"^::: (\S+)$", re.MULTILINE)


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


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them; of the reference also those of what it documents."""
    text = prose(page)
    found: set[str] = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if s not in found))
    return found | set(DOCUMENTED.findall(text))


def links(page: Path) -> list[str]:
    return [inline or reference for inline, reference in LINK.findall(CODE.sub("", prose(page)))]


def broken(page: Path, link: str) -> str | None:
    """What is wrong with a link; None if it leads somewhere."""
    url = urlsplit(link)
    if url.scheme:
        good = url.scheme == "mailto" or (url.scheme == "https" and "." in url.netloc and " " not in link)
        return None if good else "not an https URL"
    target = (page.parent / url.path).resolve() if url.path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return "no such file"
    if url.fragment and target.suffix == ".md" and url.fragment not in anchors(target):
        return "no such heading"
    return None
