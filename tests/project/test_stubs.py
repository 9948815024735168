"""What editors show: every public function has all of its keywords, in a signature and in a stub that says the same."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import stubs
from malformed import FUNCTIONS, MODULES

import fused_pref as fp

# What the stubs define; their annotations are compared as text.
DEFINED: dict[str, dict[str, Any]] = {}
for source in stubs.MODULES:
    text = "from __future__ import annotations\n" + source.with_suffix(".pyi").read_text(encoding="utf-8")
    DEFINED[source.stem] = {}
    exec(compile(text, source.name, "exec", dont_inherit=True), DEFINED[source.stem])


@pytest.mark.parametrize("source", stubs.MODULES, ids=lambda source: source.stem)
def test_a_stub_is_current(source: Path) -> None:
    """If not, run ``python3 dev.py stubs``."""
    written = ast.parse(source.with_suffix(".pyi").read_text(encoding="utf-8"))
    assert without_imports(written) == without_imports(ast.parse(stubs.stub(source)))


def without_imports(module: ast.Module) -> list[str]:
    return [ast.unparse(node) for node in module.body if not isinstance(node, ast.ImportFrom)]


def shown(function: Any) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_of_functions(name: str) -> None:
    found = [module[name] for module in DEFINED.values() if inspect.isfunction(module.get(name))]
    assert len(found) == 2
    for function in found:
        assert shown(function) == shown(getattr(fp, name))
        assert shown(function) == shown(getattr(fp.reference, name))
        assert not any(kind is inspect.Parameter.VAR_KEYWORD for _, kind, _ in shown(function))


@pytest.mark.parametrize("name", MODULES)
def test_signatures_of_modules(name: str) -> None:
    (found,) = (module[name] for module in DEFINED.values() if name in module)
    assert shown(found) == shown(getattr(fp, name))
    assert shown(found.forward) == shown(getattr(fp, name).forward)


@pytest.mark.parametrize("name", [name for name in fp.__all__ if name != "reference"])
def test_no_public_signature_hides_keywords(name: str) -> None:
    assert not any(kind is inspect.Parameter.VAR_KEYWORD for _, kind, _ in shown(getattr(fp, name)))
