"""Assembly of gfx942 as the instructions that ``machine.cpp`` executes."""

import ctypes
import re
import struct
from collections.abc import Callable, Iterator

U8, U32, I32, U64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64
VECTOR, SCALAR, CONSTANT, OFF = 1, 2, 3, 4
WHOLE = 6


def _fields(**types: str) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in ((globals()[k], v) for k, v in types.items()) for name in names.split()]


class Operand(ctypes.Structure):
    """As in ``machine.h``."""

    _fields_ = [
        *_fields(U8="place negate absolute sign_extend part unused"), ("index", ctypes.c_uint16),
        *_fields(U32="bits half", U64="float64 int64"),
    ]  # fmt: skip


class Instruction(ctypes.Structure):
    """As in ``machine.h``."""

    _fields_ = [
        ("operation", U32), ("target", I32), ("out", Operand), ("carry", Operand), ("source", Operand * 4),
        *_fields(I32="offset offset1 vmcnt lgkmcnt"),
        *[(name, U8 * 4) for name in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi")],
        *_fields(U8="clamp omod dpp dpp_kind"), ("dpp_lanes", U8 * 4),
        *_fields(U8="row_mask bank_mask bound_ctrl sdwa out_part out_rest offen idxen"),
    ]  # fmt: skip


REGISTERS = {
    "vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec": 126, "exec_lo": 126, "exec_hi": 127,
}  # fmt: skip
PARTS = {"BYTE_0": 0, "BYTE_1": 1, "BYTE_2": 2, "BYTE_3": 3, "WORD_0": 4, "WORD_1": 5, "DWORD": WHOLE}
RESTS = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
# Kinds of DPP, by name and, where lanes are shared out, by its value.
DPP = {"quad_perm": 1, "row_shl": 2, "row_shr": 3, "row_ror": 4, "row_mirror": 5, "row_half_mirror": 6,
       "row_bcast:15": 7, "row_bcast:31": 8, "row_newbcast": 9}  # fmt: skip
FLAGS = {"offen", "idxen", "clamp", "bound_ctrl"}
CARRY = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32|v_mad_[iu]64_[iu]32|v_div_scale_f")
WITHOUT_RESULT = re.compile(r"(buffer|global|flat)_store|ds_write|s_cmp|s_bitcmp")
ALONE = re.compile(r"s_(nop|barrier|endpgm|sleep|setprio|code_end)|buffer_(inv|wbl2)")
# 1/2π is the one constant whose digits are not all written.
INVERSE_TAU = (0x3E22F983, 0x3118, 0x3FC45F306DC9C882)


def split(text: str, separator: str) -> list[str]:
    """Parts of a text, not split inside of brackets."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[(]*[\])])", text) if part.strip()]


def operand(o: Operand, text: str) -> None:
    """Read a register or a constant, with modifiers."""
    o.part = WHOLE
    sign, negative, magnitude, name = re.fullmatch(r"(sext\()?(-(?![\d.])|neg\()?(\||abs\()?(.+?)[|)]*", text).groups()
    o.sign_extend, o.negate, o.absolute = bool(sign), bool(negative), bool(magnitude)
    register = re.fullmatch(r"([vsa])\[?(\d+)(?::\d+)?\]?", name)
    if register:
        o.place, o.index = (SCALAR if register[1] == "s" else VECTOR), int(register[2]) + 256 * (register[1] == "a")
    elif name in REGISTERS:
        o.place, o.index = SCALAR, REGISTERS[name]
    elif name in ("off", "null"):
        o.place = OFF
    elif re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", name):
        values = (struct.unpack(i, struct.pack(f, float(name)))[0] for i, f in (("I", "f"), ("H", "e"), ("Q", "d")))
        o.place = CONSTANT
        o.bits, o.half, o.float64 = INVERSE_TAU if name.startswith("0.1591549") else values
        o.int64 = o.float64
    else:
        value = int(name, 0)
        o.place, o.bits, o.half = CONSTANT, value & 0xFFFFFFFF, value & 0xFFFF
        # A literal is the high half of a float64, and the low half of an integer.
        small = -16 <= value <= 64
        o.float64 = value & (2**64 - 1) if small else (value & 0xFFFFFFFF) << 32
        o.int64 = value & (2**64 - 1) if small else value & 0xFFFFFFFF


def swizzle(text: str) -> int:
    """The bits of a swizzle pattern."""
    name, *values = [part.strip().strip('"') for part in text.split(",")]
    if name == "BITMASK_PERM":
        bits = [(c in "pi", c == "1", c == "i") for c in reversed(values[0])]
        return sum(int(on) << (5 * k + i) for i, kinds in enumerate(bits) for k, on in enumerate(kinds))
    numbers = [int(value) for value in values]
    if name == "QUAD_PERM":
        return 0x8000 | sum(n << 2 * i for i, n in enumerate(numbers))
    if name == "BROADCAST":
        return numbers[1] << 5 | (0x1F & ~(numbers[0] - 1))
    return {"SWAP": numbers[0], "REVERSE": numbers[0] - 1}[name] << 10 | 0x1F


def modify(i: Instruction, modifier: str) -> None:
    """Apply a modifier at the end of a line."""
    key, _, value = modifier.partition(":")
    if key in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi"):
        setattr(i, key, (U8 * 4)(*map(int, value.strip("[]").split(","))))
    elif key == "offset" and value.startswith("swizzle"):
        i.offset = swizzle(value[8:-1])
    elif key in ("offset", "offset0"):
        i.offset = int(value, 0)
    elif key in ("offset1", "row_mask", "bank_mask"):
        setattr(i, key, int(value, 0))
    elif key in FLAGS:
        setattr(i, key, 1)
    elif key in ("mul", "div"):
        i.omod = {"mul:2": 1, "mul:4": 2, "div:2": 3}[modifier]
    elif key in DPP or modifier in DPP:
        i.dpp_kind = DPP.get(modifier) or DPP[key]
        i.dpp_lanes = (U8 * 4)(*map(int, value.strip("[]").split(","))) if value else (U8 * 4)()
    elif key == "dst_sel":
        i.out_part = PARTS[value]
    elif key == "dst_unused":
        i.out_rest = RESTS[value]
    elif key in ("src0_sel", "src1_sel"):
        i.source[int(key[3])].part = PARTS[value]
    elif key not in ("sc0", "sc1", "nt"):
        raise NotImplementedError(f"modifier {modifier}")


class Program:
    """The instructions of a kernel, and what a launch needs to know of it."""

    def __init__(self, assembly: str, number_of: Callable[[bytes], int]) -> None:
        self.settings = {m[1]: int(m[2], 0) for m in re.finditer(r"^\t\t\.amdhsa_(\w+) (\d+)$", assembly, re.M)}
        modes = {"float_round_mode_32": 0, "float_denorm_mode_32": 3, "float_denorm_mode_16_64": 3, "ieee_mode": 1}
        assert modes.items() <= self.settings.items(), "another mode of floats than is emulated"
        self.assembly = assembly
        self.text: list[str] = []
        self.sources: list[tuple[str, int]] = []
        self.labels: dict[str, int] = {}
        for line, place in self._lines(assembly[: assembly.index(".amdhsa_kernel")]):
            self.text.append(line)
            self.sources.append(place)
        self.code = (Instruction * len(self.text))()
        for i, line in zip(self.code, self.text, strict=True):
            self._decode(i, line, number_of)
        # With arguments in registers, the code begins with loads for firmware that cannot preload them.
        self.preload = self.settings.get("user_sgpr_kernarg_preload_length", 0)
        branches = (i.target for i, line in zip(self.code, self.text, strict=True) if line.startswith("s_branch"))
        self.entry = next(branches) if self.preload else 0
        listed = assembly[assembly.index("amdhsa.kernels:") :]
        listed = listed[: listed.index(".group_segment_fixed_size")]
        self.arguments = [(int(a), int(b)) for a, b in re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", listed)]

    def _lines(self, assembly: str) -> Iterator[tuple[str, tuple[str, int]]]:
        """Instructions and the source lines that they are of; labels are noted."""
        files: dict[str, str] = {}
        place, number = ("?", 0), 0
        for line in assembly.splitlines():
            line = line.split(";")[0].split("//")[0].strip()
            label = re.match(r"([.\w$]+):", line)
            if label:
                self.labels[label[1]] = number
            elif match := re.match(r"\.file\s+(\d+)\s+.*\"([^\"]+)\"", line):
                files[match[1]] = match[2]
            elif match := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                place = (files.get(match[1], match[1]), int(match[2]))
            elif line and not line.startswith("."):
                number += 1
                yield line, place

    def _decode(self, i: Instruction, line: str, number_of: Callable[[bytes], int]) -> None:
        full, _, rest = line.replace("\t", " ").partition(" ")
        name = re.sub(r"_(e32|e64|dpp|sdwa|e64_dpp)$", "", full)
        i.operation = number = number_of(name.encode())
        if number < 0:
            raise NotImplementedError(f"instruction {name}")
        i.vmcnt = i.lgkmcnt = -1
        i.out_part, i.sdwa, i.dpp = WHOLE, full.endswith("_sdwa"), full.endswith("_dpp")
        i.row_mask = i.bank_mask = 15
        if name.startswith("v_pk_"):
            i.op_sel_hi = (U8 * 4)(1, 1, 1, 1)
        if name == "s_waitcnt":
            for key, value in re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", rest):
                setattr(i, key, int(value))
            if rest.strip() == "0":
                i.vmcnt = i.lgkmcnt = 0
        elif re.match(r"s_c?branch", name):
            i.target = self.labels[rest.strip()]
        elif not ALONE.match(name):
            *operands, last = split(rest, ",")
            last, *modifiers = split(last, " ")
            operands.append(last)
            if not WITHOUT_RESULT.match(name):
                operand(i.out, operands.pop(0))
                if CARRY.match(name):
                    operand(i.carry, operands.pop(0))
            for source, text in zip(i.source, operands, strict=False):
                operand(source, text)
            for modifier in modifiers:
                modify(i, modifier)
