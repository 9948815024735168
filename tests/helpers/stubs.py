"""Type stubs of the public functions and modules, for editors: ``**keywords`` written out, with types and defaults.

``python3 dev.py stubs`` writes them, from the source alone: a signature from its module, keywords from
``fused_pref/keywords.py``. ``tests/project/test_stubs.py`` holds them to the signatures that ``help()`` shows.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = tuple(
    ROOT / "fused_pref" / name
    for name in ("functional.py", "modules.py", "preference.py", "reference/objectives.py", "reference/linear.py")
)
HEADER = "# Written by `python3 dev.py stubs` from {}; do not edit.\n"
ELLIPSIS = ast.Expr(ast.Constant(...))
Keyword = tuple[str, ast.expr, ast.expr, str]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def keywords(table: str) -> tuple[Keyword, ...]:
    """(name, type, default, kind) of the keywords of a table, those of its bases first."""
    (found,) = (node for node in KEYWORDS.body if isinstance(node, ast.ClassDef) and node.name == table)
    entries: dict[str, Keyword] = {}
    for base in found.bases:
        if isinstance(base, ast.Name) and base.id != "TypedDict":
            entries.update((keyword[0], keyword) for keyword in keywords(base.id))
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            # Annotated[type, Keyword(default, meaning)]
            assert isinstance(node.annotation, ast.Subscript)
            assert isinstance(node.annotation.slice, ast.Tuple)
            hint, keyword = node.annotation.slice.elts
            assert isinstance(keyword, ast.Call)
            if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
                hint = ast.parse(hint.value, mode="eval").body
            entries[node.target.id] = (node.target.id, hint, keyword.args[0], ast.unparse(keyword.func))
    return tuple(entries.values())


def accepted(decorator: ast.Call) -> list[tuple[str, ast.expr, ast.expr]]:
    """(name, type, default) of the keywords that ``accepts`` gives a function."""
    found, none = keywords(ast.unparse(decorator.args[0])), ast.Constant(None)
    if not decorator.keywords:
        return [(name, hint, default) for name, hint, default, _ in found]
    per_call = [(name, hint) for name, hint, _, kind in found if kind == "PerCall"]
    return [
        (name, hint if ast.unparse(hint).endswith("| None") else ast.BinOp(hint, ast.BitOr(), none), none)
        for name, hint in per_call
    ]


KEYWORDS = _tree(ROOT / "fused_pref" / "keywords.py")


def stub(path: Path) -> str:
    """The stub of a module."""
    body: list[ast.stmt] = []
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            body.append(_function(node))
        elif isinstance(node, ast.ClassDef):
            body.append(_class(node))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if not name.startswith("_"):
                body.append(_attribute(name) if name.isupper() else node)
    body = [*_imports(_tree(path), body), *body]
    return HEADER.format(f"{path.name} and keywords.py") + ast.unparse(ast.Module(body, [])) + "\n"


def _function(node: ast.FunctionDef) -> ast.FunctionDef:
    """Its signature, keywords written out."""
    given, kept = node.args, []
    only, values, last = list(given.kwonlyargs), list(given.kw_defaults), given.kwarg
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "accepts":
            for name, hint, default in accepted(decorator):
                only.append(ast.arg(name, hint))
                values.append(default)
            last = None
        elif ast.unparse(decorator) in ("property", "staticmethod"):
            kept.append(decorator)
    own = ast.arguments(given.posonlyargs, given.args, given.vararg, only, values, last, given.defaults)
    return ast.FunctionDef(node.name, own, [ELLIPSIS], kept, node.returns, lineno=1)


def _class(node: ast.ClassDef) -> ast.ClassDef:
    """Its methods and attributes; what ``__init__`` sets may be anything."""
    body: list[ast.stmt] = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    for part in (part for method in methods if method.name == "__init__" for part in ast.walk(method)):
        target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            body.append(_attribute(target.attr))
    body += [_function(method) for method in methods if method.name == "__init__" or method.name[0] != "_"]
    return ast.ClassDef(node.name, node.bases, node.keywords, body or [ELLIPSIS], [])


def _attribute(name: str) -> ast.AnnAssign:
    return ast.AnnAssign(ast.Name(name), ast.Name("Any"), None, 1)


def _imports(module: ast.Module, body: list[ast.stmt]) -> list[ast.stmt]:
    """What the statements need: imports of the module and of the keywords, and what the keywords define."""
    needed = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    found: dict[str, dict[str, None]] = {}
    for node in (*ast.walk(module), *ast.walk(KEYWORDS)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if alias.name in needed:
                    needed.remove(alias.name)
                    found.setdefault(node.module, {})[alias.name] = None
    defined = [ast.unparse(node.targets[0]) for node in KEYWORDS.body if isinstance(node, ast.Assign)]
    for name in sorted(needed.intersection(defined)):
        found.setdefault("fused_pref.keywords", {})[name] = None
    return [ast.ImportFrom(source, [ast.alias(name) for name in names], 0) for source, names in found.items()]


def main() -> int:
    """Write the stubs, formatted where ruff is installed."""
    paths = [path.with_suffix(".pyi") for path in MODULES]
    for module, path in zip(MODULES, paths, strict=True):
        path.write_text(stub(module), encoding="utf-8")
    for tool in (["check", "--fix", "--select", "I"], ["format"]):
        subprocess.run([sys.executable, "-m", "ruff", *tool, "--quiet", *map(str, paths)], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
