"""Offsets in the compiled code: none is the product of a number of a row and a stride in 32 bits.

Every case of ``python -m fused_pref kernels`` is lowered to Triton's IR for sm_90, in a process of its own, and the
values in it are followed to the pointers that they move. A 32-bit value may be a position along one dimension, each of
which has fewer than 2³¹ entries: where it grows to a number of entries of a tensor, it has to be widened beforehand.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from enum import IntEnum

import pytest
import torch

from fused_pref.head.plans.head import Head, HeadCall
from fused_pref.ops.interface import Transform
from fused_pref.ops.triton import configs
from fused_pref.spec import Spec


class Kind(IntEnum):
    """What an integer is; a result is as bad as the worst of what it is made of."""

    CONSTANT = 0
    BLOCK = 1  # bounded by the size of a block
    INDEX = 2  # a position along a dimension, or the number of a block of them
    SIZE = 3  # a size or a stride that was passed
    LOADED = 4  # read from memory
    PRODUCT = 5  # of two of them in 32 bits, or a multiple of a size: may be beyond 2³¹


# Arguments that are numbers of blocks, and products with arguments that stay below 2³¹ for a reason.
SMALL = {"%splits"}
BOUNDED = {
    # Number of a split times its width: a column.
    (Kind.INDEX, "%split_columns"),
    # Rows of a tile times what lies between rows of a chunk or of the weight: see test_offsets_in_a_tile_fit.
    (Kind.BLOCK, "%out_stride"),
    (Kind.BLOCK, "%weight_stride"),
}

Definition = tuple[str, list[str], str]
NAME = re.compile(r"%[\w.]+(?:#\d+)?")
LINE = re.compile(r"(%[\w.:]+(?:, %[\w.:]+)*) = \"?([\w.]+)\"?(.*)")
LOCATION = re.compile(r" loc\(((?:[^()]|\([^()]*\))*)\)")
RESULT = re.compile(r".*[:>] *(?:tensor<[\dx]*)?(i\d+)>?$")


class Code:
    """A kernel in Triton's IR: of every value the ways it is come by.

    Values that have the same name in different loops are taken together, and so are all of one that a loop carries:
    what is said of them holds for each.
    """

    def __init__(self, text: str) -> None:
        self.indices = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
        self.values: dict[str, list[Definition]] = defaultdict(list)
        self.offsets: list[tuple[str, str]] = []
        # Of each region the values that its yields give: results and what it carries.
        self.regions: list[tuple[list[str], list[str]]] = []
        for line in text.splitlines():
            self._read(line.strip())
        self.kinds = dict.fromkeys(self.values, Kind.CONSTANT)
        while self._step():
            pass

    @property
    def violations(self) -> list[str]:
        """File and line of every pointer moved by a product in 32 bits."""
        return sorted({self._place(at) for name, at in self.offsets if self.kinds.get(name) == Kind.PRODUCT})

    def _read(self, line: str) -> None:
        at = "".join(LOCATION.findall(line)[-1:])
        line = LOCATION.sub("", line)
        found = LINE.match(line)
        results, operation, rest = found.groups() if found else ("", line.split("(")[0].split(" ")[0], line)
        results = [name for result in results.split(", ") for name in self._each(result)]
        names = NAME.findall(rest)
        if operation == "tt.func":
            for name in re.findall(r"(%[\w.]+): i(?:32|64)\b", line):
                self.values[name].append(("argument", [], ""))
        elif operation in ("scf.yield", "scf.condition"):
            for group in self.regions[-1]:
                self._join(group, names[operation == "scf.condition" :])
        elif operation in ("scf.for", "scf.while", "scf.if"):
            if operation == "scf.for":
                self.values[names[0]].append(("counter", [names[1]], ""))
            pairs = re.findall(r"(%[\w.]+) = (%[\w.#]+)", rest.replace(names[0] + " = ", "", operation == "scf.for"))
            carried, initial = [into for into, _ in pairs], [value for _, value in pairs]
            self._join(carried, initial)
            self._join(results, initial)
            self.regions.append((results, carried))
            return
        elif found:
            for result in results:
                self.values[result].append((operation, names, rest))
            if operation == "tt.addptr":
                self.offsets.append((names[1], at))
            elif operation.startswith("tt.descriptor"):
                self.offsets += [(name, at) for name in names[1:]]
        if line.endswith("{") and not line.startswith("}"):
            self.regions.append(([], []))
        elif line.startswith("}") and not line.endswith("{"):
            self.regions.pop()

    @staticmethod
    def _each(result: str) -> list[str]:
        """The names of ``%x``, or of ``%x:2``."""
        name, _, number = result.partition(":")
        return [f"{name}#{i}" for i in range(int(number))] if number else [name]

    def _join(self, into: list[str], values: list[str]) -> None:
        for name, value in zip(into, values, strict=False):
            self.values[name].append(("join", [value], ""))

    def _step(self) -> bool:
        changed = False
        for name, definitions in self.values.items():
            kind = max(self._kind(name, *definition) for definition in definitions)
            changed |= kind > self.kinds[name]
            self.kinds[name] = max(kind, self.kinds[name])
        return changed

    def _kind(self, name: str, operation: str, operands: list[str], rest: str) -> Kind:
        kinds = [self.kinds.get(operand, Kind.CONSTANT) for operand in operands]
        worst = max(kinds, default=Kind.CONSTANT)
        if operation == "argument":
            return Kind.BLOCK if name in SMALL else Kind.SIZE
        if operation == "tt.make_range":
            return Kind.BLOCK
        if operation == "tt.get_program_id":
            return Kind.INDEX
        if operation in ("tt.load", "tt.descriptor_load"):
            return Kind.LOADED
        if operation in ("tt.addptr", "arith.cmpi", "arith.constant"):
            return Kind.CONSTANT
        if worst == Kind.PRODUCT:
            return Kind.INDEX if self._is_remainder(operation, operands) else worst
        if operation == "arith.minsi":  # of what is not negative
            return min(kinds)
        if operation == "counter":
            return Kind.INDEX
        if operation == "arith.trunci":
            return Kind.LOADED
        if operation == "arith.divsi" and kinds == [Kind.SIZE, Kind.CONSTANT]:
            return Kind.INDEX
        if operation in ("arith.muli", "arith.shli") and self._narrow(rest):
            return self._product(operands, kinds)
        if operation == "arith.addi" and kinds == [Kind.SIZE, Kind.SIZE] and self._narrow(rest):
            return Kind.PRODUCT
        return worst

    def _product(self, operands: list[str], kinds: list[Kind]) -> Kind:
        low, high = sorted(kinds)
        if low == Kind.CONSTANT and high <= Kind.INDEX:
            return high
        bounded = any((kinds[i], self._origin(operands[1 - i])) in BOUNDED for i in range(2))
        return low if bounded else Kind.PRODUCT

    def _narrow(self, rest: str) -> bool:
        found = RESULT.match(rest)
        assert found, rest
        return found[1] == "i32"

    def _only(self, name: str) -> Definition:
        """How a value is come by, if there is one way."""
        found = self.values.get(name, [])
        return found[0] if len(found) == 1 else ("", [], "")

    def _origin(self, name: str) -> str:
        """The value that was made a block."""
        operation, operands, _ = self._only(name)
        return self._origin(operands[0]) if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") else name

    def _is_remainder(self, operation: str, operands: list[str]) -> bool:
        """Whether a difference is x − (x / y) y."""
        if operation != "arith.subi":
            return False
        x, product = operands
        factor, factors, _ = self._only(product)
        if factor != "arith.muli":
            return False
        return any(self._only(factors[i])[:2] == ("arith.divsi", [x, factors[1 - i]]) for i in range(2))

    def _place(self, at: str) -> str:
        """File and line of a location, through the functions that were inlined there."""
        found = re.search(r"(\w+\.py)\":(\d+)", at)
        if found:
            return f"{found[1]}:{found[2]}"
        name = re.search(r"#loc\d*", at)
        assert name, at
        return self._place(self.indices[name[0]])


# Runs without the interpreter. What stands in the cache of compiled kernels is taken from there; what does not, is
# lowered no further than needed.
COLLECT = """
import json
from unittest import mock
from triton.backends.nvidia.compiler import CUDABackend
from fused_pref.cli.kernels import compile

class Lowered(Exception):
    pass

def stop(module, *rest):
    raise Lowered(str(module))

def lower(name, launcher):
    for launch in compile.record(launcher, "sm_90"):
        try:
            with mock.patch.object(CUDABackend, "make_ttgir", staticmethod(stop)):
                text = compile.compile_launch(launch, "sm_90").asm["ttir"]
        except Lowered as lowered:
            text = str(lowered)
        codes[f"{launch.kernel.__name__}, {name}"] = text

codes = {}
"""
OURS = """
import torch
from fused_pref.ops.interface import TargetRows, Transform
from fused_pref.ops.triton import chunk, dlogits, logprob, sequences
from fused_pref.cli.kernels.cases import CASES, meta

for case in CASES:
    for dtype in case.dtypes:
        lower(f"{case.name}, {dtype}", lambda: case.launch(dtype))

# Strides that the cases do not have.
n, v, d = 8192, 4096, 2048
labels, ends = meta(n, 2, dtype=torch.int64)[:, 0], meta(9, dtype=torch.int32)
logits, logp, rest = meta(v, n).T, meta(n), (-100, Transform())
target_rows = TargetRows(labels, logp, meta(d, v).T)
for given in (ends, None):
    own, z = (labels, logits) if given is not None else (labels.view(2, -1), logits.view(2, n // 2, v))
    mine = logp.view(own.shape)
    lower(f"strides, {given is None}", lambda: logprob.token_logps_fwd(z, own, "all", *rest))
    lower(f"strides, {given is None}", lambda: dlogits.token_logps_bwd(z, z, own, meta(3, n), mine, *rest))
    lower(f"strides, {given is None}", lambda: sequences.sequence_scores(mine, mine, own, given, "all", -100))
    lower(f"strides, {given is None}", lambda: sequences.targets_of(own, given, -100))
seen = (meta(4, n), labels, Transform(), -100)
lower("strides", lambda: chunk.exponentials(meta(n, v), meta(n, v), *seen, logit_sum=True, apart=True))
lower("strides", lambda: chunk.take_targets(meta(n, v), labels, 0))
lower("strides", lambda: chunk.finish(meta(4, n), labels, v, -100))
lower("strides", lambda: chunk.scatter_rows(meta(n, d), meta(d, n).T, logp, labels.contiguous(), target_rows))
lower("strides", lambda: chunk.add_target_rows(meta(v, d), meta(d, n).T, logp, labels))
"""
WRONG = """
import torch
from fused_pref.cli.kernels.cases import meta
from wrong_kernels import late_kernel, narrow_kernel
rows = meta(8, 64)
lower("wrong", lambda: narrow_kernel[8,](rows, meta(512), 72, 64, BLOCK=64))
lower("wrong", lambda: late_kernel[8,](meta(8, dtype=torch.int32), rows, meta(8), 72))
lower("whole", lambda: narrow_kernel[8,](rows, rows, 1, 1, BLOCK=64))
"""


def lowered(script: str) -> dict[str, str]:
    """Kernels and cases → IR."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", f"{COLLECT}{script}\nprint(json.dumps(codes))"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_offset_is_a_product_in_32_bits() -> None:
    codes = {name: Code(text) for name, text in lowered(OURS).items()}
    assert all(code.offsets for code in codes.values())
    found = {(name.split(",")[0], place) for name, code in codes.items() for place in code.violations}
    assert not found


@pytest.mark.slow
def test_wrong_kernels_are_noticed() -> None:
    """Products of the number of a program, and of a number from memory that is widened too late."""
    found = {name: len(Code(text).violations) for name, text in lowered(WRONG).items()}
    assert found == {"narrow_kernel, wrong": 2, "late_kernel, wrong": 1, "narrow_kernel, whole": 0}


def test_offsets_in_a_tile_fit() -> None:
    """Between rows lie fewer than 2²² entries, and 16 of padding, where the fused kernels are taken."""

    def fusible(columns: int, stride: int) -> bool:
        weight = torch.empty_strided((columns, 1), (stride, 1), device="meta")
        spec = Spec("triton", True, -100, Transform(), None)
        return Head(HeadCall(spec, torch.float32, frozenset()), torch.empty(1, 1), weight, None).fusible

    assert fusible(2**22 - 1, 2**22 - 1)
    assert not fusible(2**22, 1)
    assert not fusible(1, 2**22)
    tables = [table for table in vars(configs).values() if isinstance(table, dict)]
    tiles = [tile for table in tables for tile in table.values() if isinstance(tile, configs.Tile)]
    sizes = [size for tile in tiles for size in (tile.rows, tile.columns)]
    sizes += [size for candidates in configs.TILE_CANDIDATES.values() for tile in candidates for size in tile[:2]]
    assert len(sizes) > 20
    assert max(sizes) * (2**22 + 16) < 2**31
