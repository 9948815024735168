"""Links of every Markdown file: what is in the repository exists, anchors too; others are only looked at."""

import functools
import re
from pathlib import Path
from urllib.parse import urlsplit

import pages
import pytest
from pages import PAGES, ROOT

import fused_pref as fp
from fused_pref import models, testing, trl

CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
# What the reference makes headings of.
DOCUMENTED = re.compile(r"^::: (\S+)$", re.MULTILINE)


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them; of the reference also those of what it documents."""
    text = pages.prose(page)
    found: set[str] = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if s not in found))
    return found | set(DOCUMENTED.findall(text))


def links(page: Path) -> list[str]:
    return [inline or reference for inline, reference in LINK.findall(CODE.sub("", pages.prose(page)))]


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


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_links(page: Path) -> None:
    wrong = {link: why for link in links(page) if (why := broken(page, link))}
    assert not wrong


def test_wrong_links_are_seen(tmp_path: Path) -> None:
    page = ROOT / "README.md"
    assert broken(page, "docs/index.md") is None
    assert broken(page, "docs/plans.md#grouped") is None
    assert broken(page, "docs/api/functions.md#fused_pref.cpo_loss") is None
    assert broken(page, "docs/api/reference.md#fused_pref.reference.cpo_loss") is None
    assert broken(page, "#which-function-for-which-loss") is None
    for link in ("docs/nothing.md", "docs/plans.md#nothing", "../README.md", "http://a.org", "https://nowhere"):
        assert broken(page, link)
    assert broken(page, "docs/api/functions.md#fused_pref.epo_loss")


def test_every_public_name_is_in_the_reference() -> None:
    shown = {name for page in PAGES for name in DOCUMENTED.findall(pages.read(page))}
    for module in (fp, fp.reference, models, testing, trl):
        assert {f"{module.__name__}.{name}" for name in module.__all__} - {"fused_pref.reference"} <= shown
