"""Griffe extension: docstrings as the reference shows them.

A function that ``accepts`` a table gets its keywords, with types, defaults and meanings, as in ``help()``; and roles
(``:func:`cpo_loss```) become links to what the reference documents.
"""

import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import griffe

import fused_pref
from fused_pref import keywords

PAGES = Path(__file__).parents[1] / "api"
DOCUMENTED = {name for page in PAGES.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)}
ACCEPTS = re.compile(r"accepts\((\w+)(, per_call=True)?\)")
ROLE = re.compile(r":\w+:`([^`]+)`")
# Names that share a description, and what belongs to it.
SHARED = re.compile(r"^( +)([a-z*][\w*]*(?:, [a-z*][\w*]*)+):(.*(?:\n\1 +.*)*)", re.MULTILINE)


class Keywords(griffe.Extension):
    """See the module."""

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Put the keywords of a table in the place of ``**keywords``."""
        match = ACCEPTS.search(" ".join(str(decorator.value) for decorator in func.decorators))
        if not match:
            return
        # `add` refuses a name twice, and the table takes the place of the last one.
        given, per_call = func.parameters, bool(match[2])
        del given[given[len(given) - 1].name]
        lines = ["Args: Keywords"]
        for name, (annotation, keyword) in _table(match[1], per_call=per_call).items():
            kind = griffe.ParameterKind.keyword_only
            given.add(griffe.Parameter(name, annotation=annotation, kind=kind, default=repr(keyword.default)))
            lines.append(f"    {name}: {keyword.meaning}.")
        # A class says what its constructor takes.
        owner = func.parent if func.name == "__init__" else func
        if owner and owner.docstring and not per_call:
            before, after = _split(owner.docstring.value)
            owner.docstring.value = "\n".join([before, *lines, "", after]).strip()

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Turn roles into links, and give every name its own entry."""
        if obj.docstring:
            text = ROLE.sub(lambda role: _link(role[1], obj), obj.docstring.value)
            obj.docstring.value = SHARED.sub(_apart, text)


def _table(name: str, *, per_call: bool) -> dict[str, tuple[str, keywords.Keyword]]:
    """Name → (type as it is written, keyword)."""
    table = getattr(keywords, name)
    hints = get_type_hints(table, localns={"RewardShift": fused_pref.RewardShift})
    found = keywords.table(table, per_call=per_call)
    return {name: (_written(hints[name] | None if per_call else hints[name]), found[name][1]) for name in found}


def _written(hint: Any) -> str:
    text = re.sub(r"\b[a-z_]+(?:\.[a-z_]+)*\.", "", inspect.formatannotation(hint))
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def _apart(shared: re.Match[str]) -> str:
    indent, names, meaning = shared.groups()
    return "\n".join(f"{indent}{name}:{meaning}" for name in names.split(", "))


def _split(docstring: str) -> tuple[str, str]:
    """What comes before the results and errors of a docstring, and these."""
    parts = re.split(r"^(?=(?:Returns|Raises):)", docstring, maxsplit=1, flags=re.M)
    return parts[0], "".join(parts[1:])


def _link(name: str, obj: griffe.Object) -> str:
    """A link to what is documented under this name, seen from an object; else the name as code."""
    text = name.removeprefix("fused_pref.")
    for scope in (f"{obj.path}.", f"{obj.path.rpartition('.')[0]}.", f"{obj.module.path}.", "", "fused_pref."):
        owner, _, member = f"{scope}{name}".rpartition(".")
        # A method is documented with its class.
        if f"{owner}.{member}" in DOCUMENTED or (owner in DOCUMENTED and owner.rpartition(".")[2][0].isupper()):
            return f"[`{text}`][{owner}.{member}]"
    return f"`{text}`"
