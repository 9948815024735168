"""The module map, docs/module-map.md: what imports what, what an import costs, how long files and functions are."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fused_pref"
LINES, FUNCTION_LINES = 400, 60
# Why these functions are longer.
LONG = {
    "bco.py: __init__": "the arguments of TRL's trainer stand in the signature, and in the call that hands them on",
}


@functools.cache
def layers() -> dict[str, int]:
    """Module → layer, from the tables of the page."""
    page = (ROOT / "docs" / "module-map.md").read_text(encoding="utf-8")
    found, layer = {}, 0
    for number, module in re.findall(r"^(?:## Layer (\d+): \w+$|\| `([\w.]+)` \|)", page, re.MULTILINE):
        layer = int(number or layer)
        if module:
            assert module not in found, module
            found[module] = layer
    return found


@functools.cache
def modules() -> dict[str, Path]:
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}


def imports(path: Path, *, top: bool = False, typing: bool = True) -> Iterator[str]:
    """Modules that are imported, inside functions too unless ``top``, and with ``typing`` for type checkers."""

    def walk(node: ast.AST) -> Iterator[str]:
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if top and isinstance(node, ast.FunctionDef):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else node.module
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def graph(**options: bool) -> dict[str, set[str]]:
    known = modules()
    found = {module: {name for name in imports(path, **options) if name in known} for module, path in known.items()}
    return {module: others - {module} for module, others in found.items()}


def test_the_map_has_every_module() -> None:
    assert set(layers()) == set(modules())
    assert set(layers().values()) == {1, 2, 3, 4, 5, 6}


def test_contributing_names_every_folder() -> None:
    """With the files and folders that its rows name."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Module map")[1].split("\n## ")[0]
    named = set(re.findall(r"`(?:fused_pref/)?(\w+(?:\.py)?)`", table))
    folders = {path.parent.name for path in modules().values() if path.parent.parent == PACKAGE}
    assert folders <= named
    assert all((PACKAGE / name).exists() for name in named if name.endswith(".py"))


def test_imports_go_down() -> None:
    up = [(a, b) for a, others in graph(typing=False).items() for b in others if layers()[b] > layers()[a]]
    assert up == []


def test_imports_make_no_circle() -> None:
    assert list(graphlib.TopologicalSorter(graph()).static_order())


def test_no_two_folders_import_each_other() -> None:
    folder = {module: path.parent.relative_to(ROOT).as_posix() for module, path in modules().items()}
    pairs = {(folder[a], folder[b]) for a, others in graph().items() for b in others if folder[a] != folder[b]}
    assert {pair for pair in pairs if pair[::-1] in pairs and "fused_pref" not in pair} == set()


def test_kernels_are_imported_inside_functions() -> None:
    """Outside of ``ops.triton``, the command that compiles it and the search, importing a module imports no Triton."""
    found = [
        (module, name)
        for module, path in modules().items()
        if not module.startswith(("fused_pref.ops.triton", "fused_pref.cli.kernels", "fused_pref.cli.tune"))
        for name in imports(path, top=True, typing=False)
        if name.startswith(("fused_pref.ops.triton", "triton"))
    ]
    assert found == []


def test_import_brings_in_little_and_takes_little() -> None:
    """Beyond PyTorch: this library and typing_extensions; in less than a second, the least of three times."""
    code = (
        "import sys, time, torch, torch.distributed, torch.library\n"
        "known, start = set(sys.modules), time.perf_counter()\n"
        "import fused_pref\n"
        "took = time.perf_counter() - start\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - known}\n"
        "allowed = {'fused_pref', 'torch', 'triton', 'typing_extensions'} | set(sys.stdlib_module_names)\n"
        "print(took, *sorted(names - allowed))"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took, *others = done.stdout.split()
        assert others == []
        times.append(float(took))
        if times[-1] < 1:
            break
    assert min(times) < 1


@pytest.mark.parametrize("folder", ["fused_pref", "benchmarks", "tests"])
def test_files_and_functions_are_short(folder: str) -> None:
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        long += [path.name] if text.count("\n") > LINES else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                inside = node.body[1:] if ast.get_docstring(node) is not None else node.body
                documented = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if inside != node.body else 0
                length = (node.end_lineno or 0) - node.lineno + 1 - documented
                long += [f"{path.name}: {node.name}"] if length > FUNCTION_LINES else []
    assert set(long) <= set(LONG)
