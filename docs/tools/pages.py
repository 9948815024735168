"""MkDocs hook: what pages need beyond Markdown.

- A page of the navigation that is not in ``docs/`` is the file of that path in the repository.
- Relative links are those of the repository, and lead to the page of a file; to a file that is no page there is none.
- ``<!-- help: explain -->`` becomes the help text of ``python -m fused_pref explain``.
- Nothing of a page is loaded from elsewhere.
"""

import contextlib
import io
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks.pages")

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```\s*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
HELP = re.compile(r"^<!-- help:(.*?)-->$", re.MULTILINE)
LOADED = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
WIDTH = "100"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of ``docs/``."""
    for path in _leaves(config["nav"]):
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links from paths of the repository into paths of the site, and fill in help texts."""
    source = page.file.src_uri
    place = source if page.file.generated_by else f"docs/{source}"

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        uri = found.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            if not (ROOT / found).exists():
                log.warning("%s links to %s, which is not there", place, target)
            return text
        relative = posixpath.relpath(uri, posixpath.dirname(source) or ".")
        return f"{image}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    return HELP.sub(lambda match: _help(match[1].split()), _outside_code(markdown, lambda text: LINK.sub(link, text)))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """See that the page works without a network."""
    for loaded in LOADED.finditer(output):
        log.warning("%s loads something from elsewhere: %s", page.file.src_uri, output[loaded.start() :].split(">")[0])
    return output


def _leaves(nav: Any) -> Iterator[str]:
    """The paths in a navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _leaves(part)


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        before = markdown[end : code.start()]
        # The text of a link may be code: both are left to one piece.
        if before.endswith("["):
            continue
        parts += [change(before), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _help(command: list[str]) -> str:
    """A help text, as wide as the page."""
    from fused_pref.__main__ import main

    os.environ.update(COLUMNS=WIDTH, NO_COLOR="1")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return f"```text\n{out.getvalue()}```"
