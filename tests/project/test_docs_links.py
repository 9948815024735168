"""Links of every Markdown file: what is in the repository exists, anchors too; others are only looked at."""

from pathlib import Path

import pages
import pytest
from pages import DOCUMENTED, PAGES, ROOT, broken, links

import fused_pref as fp
from fused_pref import models, testing, trl


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
