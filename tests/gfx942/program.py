"""Assembly of gfx942 as the instructions that ``instructions.h`` defines."""

import functools
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from gfx942.build import structure

Operand, Instruction = structure("Operand"), structure("Instruction")
VECTOR, SCALAR, CONSTANT, OFF = 1, 2, 3, 4
REGISTERS = {"vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec": 126, "exec_lo": 126, "exec_hi": 127}
# Parts of a register: the first bit, and which bits.
PARTS = {"DWORD": (0, 0xFFFFFFFF), "WORD_0": (0, 0xFFFF), "WORD_1": (16, 0xFFFF0000), "BYTE_0": (0, 0xFF)}
# An access is named after where, whether one of a pair of values, in units of 64 of them, and what.
ACCESS = re.compile(r"(buffer|global|flat|ds|s)_(load|store|read|write)(2?)(st64)?_(\w+?)(_d16_hi)?")
BYTES = {"ubyte": 1, "u8": 1, "byte": 1, "b8": 1, "ushort": 2, "u16": 2, "short": 2, "b16": 2, "dword": 4, "b32": 4,
         "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16, "dwordx8": 32}  # fmt: skip
# Which have a mask as their second result or last source, which none, and which read what they write.
MASK_OUT = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32|v_mad_[iu]64_[iu]32|v_div_scale_f")
MASK_IN = re.compile(r"v_(addc|subb|subbrev)_co_u32|v_cndmask_b32|v_div_fmas_f")
WITHOUT_RESULT = re.compile(r"(buffer|global)_store|ds_write|s_cmp|s_bitcmp")
READS_RESULT = re.compile(r"v_fmac_|v_fma_mixlo_|s_addk_")
# 1/2π is the one constant whose digits are not all written.
INVERSE_TAU = (0x3E22F983, 0x3118, 0x3FC45F306DC9C882)


def split(text: str, separator: str) -> list[str]:
    """Parts of a text, not split inside of brackets."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[(]*[\])])", text) if part.strip()]


def operand(o: Any, text: str) -> None:
    """Read a register or a constant, with modifiers."""
    negative, magnitude, name = re.fullmatch(r"(-(?![\d.])|neg\()?(\||abs\()?(.+?)[|)]*", text).groups()
    o.negate, o.absolute, (o.shift, o.mask) = bool(negative), bool(magnitude), PARTS["DWORD"]
    if register := re.fullmatch(r"([vsa])\[?(\d+)(?::\d+)?\]?", name):
        o.place, o.index = (SCALAR if register[1] == "s" else VECTOR), int(register[2]) + 256 * (register[1] == "a")
    elif name in REGISTERS:
        o.place, o.index = SCALAR, REGISTERS[name]
    elif name in ("off", "null"):
        o.place = OFF
    elif re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", name):
        values = [struct.unpack(i, struct.pack(f, float(name)))[0] for i, f in (("I", "f"), ("H", "e"), ("Q", "d"))]
        o.bits, o.half, o.float64 = INVERSE_TAU if name.startswith("0.1591549") else values
        o.place, o.int64 = CONSTANT, o.float64
    elif re.fullmatch(r"-?(\d+|0x[\da-f]+)", name):
        value = int(name, 0)
        o.place, o.bits, o.half = CONSTANT, value & 0xFFFFFFFF, value & 0xFFFF
        # A literal is the high half of a float64, and the low half of an integer.
        small = -16 <= value <= 64
        o.float64 = value & (2**64 - 1) if small else (value & 0xFFFFFFFF) << 32
        o.int64 = value & (2**64 - 1) if small else value & 0xFFFFFFFF
    else:
        raise NotImplementedError(f"operand {text}")


@functools.cache
def lanes(kind: str, *n: int) -> Any:
    """The lane that each one reads by DPP or a swizzle of this kind; -1: none."""
    read: Callable[[int], int] = {
        "quad_perm": lambda l: (l & ~3) + n[l & 3],
        "row_shl": lambda l: l + n[0] if l % 16 + n[0] < 16 else -1,
        "row_shr": lambda l: l - n[0] if l % 16 >= n[0] else -1,
        "row_ror": lambda l: (l & ~15) + (l - n[0]) % 16,
        "row_half_mirror": lambda l: l ^ 7,
        "row_bcast": lambda l: (l & ~n[0]) - 1,
        "SWAP": lambda l: l ^ n[0],
    }[kind]
    return Instruction().lanes.__class__(*map(read, range(64)))


def modify(i: Any, modifier: str, packed: bool) -> None:
    """Apply a modifier at the end of a line."""
    key, _, value = modifier.partition(":")
    numbers = [int(x, 0) for x in re.findall(r"\b(?:0x[\da-f]+|\d+)\b", value)]
    if key in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi") and packed:
        getattr(i, key)[: len(numbers)] = numbers
    elif value.startswith("swizzle(SWAP,"):
        i.lanes = lanes("SWAP", *numbers)
    elif key in ("offset", "offset0", "offset1") and numbers:
        i.offset[key == "offset1"] = int(value, 0)
    elif key in ("row_mask", "bank_mask", "bound_ctrl", "offen"):
        setattr(i, key, numbers[0] if "mask" in key else 1)
    elif re.match("quad_perm|row_", key):
        i.lanes = lanes(key, *numbers)
    elif key in ("src0_sel", "src1_sel"):
        i.source[int(key[3])].shift, i.source[int(key[3])].mask = PARTS[value]
    elif key not in ("sc0", "sc1", "nt") and modifier not in ("dst_sel:DWORD", "dst_unused:UNUSED_PAD"):
        raise NotImplementedError(modifier)


class Program:
    """The instructions of a kernel, and what a launch needs to know of it."""

    def __init__(self, assembly: str, number_of: Callable[[bytes], int]) -> None:
        self.settings = {m[1]: int(m[2], 0) for m in re.finditer(r"^\t\t\.amdhsa_(\w+) (\d+)$", assembly, re.M)}
        modes = {"float_round_mode_32": 0, "float_denorm_mode_32": 3, "float_denorm_mode_16_64": 3, "ieee_mode": 1}
        assert modes.items() <= self.settings.items(), "another mode of floats than is emulated"
        self.assembly, self.labels = assembly, dict[str, int]()
        lines = [*self._lines(assembly[: assembly.index(".amdhsa_kernel")])]
        self.text, self.sources = [line for line, _ in lines], [place for _, place in lines]
        self.code = (Instruction * len(lines))()
        for i, line in zip(self.code, self.text, strict=True):
            try:
                self._decode(i, line, number_of)
            except (NotImplementedError, KeyError) as e:
                raise NotImplementedError(f"{e} in the instruction {line}") from e
        # With arguments in registers, the code begins with loads for firmware that cannot preload them.
        self.preload = self.settings.get("user_sgpr_kernarg_preload_length", 0)
        branches = (i.target for i, line in zip(self.code, self.text, strict=True) if line.startswith("s_branch"))
        self.entry = next(branches) if self.preload else 0
        listed = assembly[assembly.index("amdhsa.kernels:") :].partition(".group_segment_fixed_size")[0]
        self.arguments = [(int(a), int(b)) for a, b in re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", listed)]

    def _lines(self, assembly: str) -> Iterator[tuple[str, tuple[str, int]]]:
        """Instructions and the source lines that they are of; labels are noted."""
        files: dict[str, str] = {}
        place, number = ("?", 0), 0
        for line in assembly.splitlines():
            line = line.split(";")[0].split("//")[0].strip()
            if label := re.match(r"([.\w$]+):", line):
                self.labels[label[1]] = number
            elif match := re.match(r"\.file\s+(\d+)\s+.*\"([^\"]+)\"", line):
                files[match[1]] = match[2]
            elif match := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                place = (files.get(match[1], match[1]), int(match[2]))
            elif line and not line.startswith("."):
                number += 1
                yield line.replace("\t", " "), place

    def _decode(self, i: Any, line: str, number_of: Callable[[bytes], int]) -> None:
        full, _, rest = line.partition(" ")
        name = re.sub(r"(_e32|_e64|_sdwa|(_e64)?_dpp)$", "", full)
        i.dpp, i.row_mask, i.bank_mask, i.vmcnt, i.lgkmcnt = full.endswith("_dpp"), 15, 15, -1, -1
        if (access := ACCESS.fullmatch(name)) and access[5] in BYTES:
            where, verb, pair, far, what, high = access.groups()
            i.bytes, i.pair, i.high = BYTES[what], bool(pair), bool(high)
            name = f"{where.replace('flat', 'global')}_{verb}" + "_d16_hi" * (i.high and verb in ("load", "read"))
        name = name.replace("v_cmp_ne_", "v_cmp_lg_") + " clamp" * rest.endswith(" clamp")
        rest = rest.removesuffix(" clamp").strip()
        i.operation = number = number_of(name.encode())
        if number < 0:
            raise NotImplementedError(name)
        if name == "s_waitcnt":
            for key, value in re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", rest):
                setattr(i, key, int(value))
        elif re.match(r"s_c?branch", name):
            i.target = self.labels[rest]
        elif rest:
            self._operands(i, name, rest)
        if i.pair:
            i.offset[:] = [x * i.bytes * (64 if far else 1) for x in i.offset]

    def _operands(self, i: Any, name: str, rest: str) -> None:
        operands = split(rest, ",")
        operands[-1], *modifiers = split(operands[-1], " ")
        if READS_RESULT.match(name):
            operands.append(operands[0])
        if not WITHOUT_RESULT.match(name):
            operand(i.out, operands.pop(0))
        if MASK_OUT.match(name):
            operand(i.mask_out, operands.pop(0))
        if MASK_IN.match(name):
            operand(i.mask_in, "vcc" if "div_fmas" in name else operands.pop())
        for source, text in zip(i.source, operands, strict=False):
            operand(source, text)
        i.op_sel_hi[:] = [name.startswith("v_pk_") and name != "v_pk_mov_b32"] * 4
        for modifier in modifiers:
            modify(i, modifier, packed=name.startswith(("v_pk_", "v_fma_mix")))
