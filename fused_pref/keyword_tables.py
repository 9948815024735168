"""What a table of keywords does: :func:`accepts` shows it in signatures, fills in defaults and refuses other names."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])


class Keyword(NamedTuple):
    """Default and meaning of one keyword."""

    default: Any
    meaning: str


class PerCall(Keyword):
    """A keyword that belongs to a batch: modules take it at construction and per call."""


@functools.cache
def table(keywords: type, *, per_call: bool = False) -> dict[str, tuple[Any, Keyword]]:
    """Name → (type, :class:`Keyword`) of a keyword table, in the order of definition.

    With ``per_call``, the :class:`PerCall` keywords alone, with default None: the value given at construction.
    """
    hints = get_type_hints(keywords, include_extras=True, localns={"RewardShift": Any})
    entries: dict[str, tuple[Any, Keyword]] = {}
    for name, hint in hints.items():
        annotation, keyword = get_args(hint)
        if not per_call:
            entries[name] = (annotation, keyword)
        elif isinstance(keyword, PerCall):
            entries[name] = (annotation | None, keyword._replace(default=None))
    return entries


def defaults(keywords: type) -> dict[str, Any]:
    """Name → default of a keyword table."""
    return {name: keyword.default for name, (_, keyword) in table(keywords).items()}


def choices(keywords: type, name: str) -> tuple[str, ...]:
    """The strings that a ``Literal`` keyword of a table allows."""
    annotation = table(keywords)[name][0]
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return tuple(value for literal in literals for value in get_args(literal))


def accepts(keywords: type, *, per_call: bool = False) -> Callable[[Function], Function]:
    """Decorate a function whose last parameter is ``**keywords`` with the names, defaults and meanings of a table.

    ``per_call``, as of :func:`table`, is for the ``forward`` of a module, whose docstring is left as it is.
    """
    entries = table(keywords, per_call=per_call)
    filled = {name: keyword.default for name, (_, keyword) in entries.items()}

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in filled and name not in own:
                    raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}")
            return function(*args, **{**filled, **given})

        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[:-1]
        own = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}
        shown = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=keyword.default, annotation=annotation)
            for name, (annotation, keyword) in entries.items()
        ]
        call.__signature__ = signature.replace(parameters=parameters + shown)  # type: ignore[attr-defined]
        if not per_call:
            lines = [
                f"    {name} (default {keyword.default!r}): {keyword.meaning}."
                for name, (_, keyword) in entries.items()
            ]
            call.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\nKeywords:\n" + "\n".join(lines)
        return cast(Function, call)

    return decorate
