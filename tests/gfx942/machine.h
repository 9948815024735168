// A compute unit of an MI300X (gfx942) as far as code can see it: registers, LDS, memory, and what is found in them.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <deque>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

constexpr int LANES = 64, VCC = 106, EXEC = 126, CONFLICT = -2;
constexpr u32 NEVER = ~0u, POISON = 0x7fa5c3e1;  // a signalling NaN: what registers and LDS hold at the start
#define EACH for (int l = 0; l < LANES; l++)

enum Place : u8 { NONE, VECTOR, SCALAR, CONSTANT, OFF };

// build.py reads the structures that follow, and the names of what is looked for.

// Where an operand is, its modifiers, and a constant as instructions of each width see it.
struct Operand {
    u8 place, negate, absolute, shift;  // shift and mask: the part of a register that is meant
    u16 index, half;
    u32 bits, mask;
    u64 float64, int64;
};

struct Instruction {
    u32 operation;
    i32 target;  // of a branch
    Operand out, mask_out, mask_in, source[4];
    i32 offset[2], vmcnt, lgkmcnt;
    u8 op_sel[4], op_sel_hi[4], neg_lo[4], neg_hi[4];
    u8 bytes, high, pair, offen;  // of an access: the high halves of registers, two values, an offset in a register
    u8 dpp, bound_ctrl, row_mask, bank_mask;
    i8 lanes[64];  // that each lane reads, by DPP or a swizzle; -1: none
};

// What is looked for.
enum Kind : u32 {
    NOTHING,
    OUT_OF_BOUNDS,
    LDS_OUT_OF_BOUNDS,
    LDS_READ_BEFORE_WRITTEN,
    LDS_RACE,
    LDS_NOT_WAITED_FOR_BEFORE_THE_BARRIER,
    RACE_BETWEEN_WORKGROUPS,
    RACE,
    NOT_WAITED_FOR_BEFORE_THE_BARRIER,
    REGISTER_READ_BEFORE_ITS_LOAD_WAS_WAITED_FOR,
    WAVES_AT_DIFFERENT_BARRIERS,
    DPP_OF_AN_INACTIVE_LANE,
    ENDLESS,
    HIGH_HALF_OF_A_CONSTANT,
    MISALIGNED,
    UNSUPPORTED,
    SAME_VALUE_STORED_TWICE
};
struct Finding {
    u32 kind, instruction;
    i32 workgroup, wave, lane, unused;
    u64 address;
};

// An access of a wave: its epoch (the number of barriers before it), and that in which it was waited for.
struct Record {
    u32 wave, issued, retired;
};
// The last accesses of a few bytes: by which workgroups (-1: none, CONFLICT: several), and their records.
struct Cell {
    i32 writer = -1, reader = -1, written = -1, read[2] = {-1, -1};
};
struct Region {
    u64 low, high;
    bool holds(u64 a, u64 n) const { return a >= low && a + n <= high; }
};
// Memory that is watched, in cells of 2^shift bytes.
struct Shadow {
    Region region;
    int shift;
    Kind race, not_waited;
    std::vector<Cell> cells;
};

// What emulator.py hands over for a launch; order of the waves: 0 rising, 1 falling, 2 one instruction of each in turn.
struct Launch {
    const Instruction* code;
    const Region *regions, *watched;  // what may be touched, and what is watched
    const u32* user;                  // scalar registers at the start
    u64 *count, *found, most_steps;
    Finding* findings;
    i32 entry, regions_size, watched_size, user_size, findings_size;
    u32 identity[3], grid[3], threads, lds;
    i32 inexact, order;
};

struct Machine {
    const Launch& launch;
    Region last{0, 0};
    std::vector<Shadow> shadows;  // the first one is of the LDS
    std::vector<Record> records;
    std::vector<u8> lds;
    i32 workgroup = 0, findings = 0;
    bool failed = false;

    bool inside(u64 a, u64 n) {
        if (last.holds(a, n)) return true;
        const Region* end = launch.regions + launch.regions_size;
        const Region* region = std::find_if(launch.regions, end, [&](const Region& r) { return r.holds(a, n); });
        if (region != end) last = *region;
        return region != end;
    }
};

struct Wave {
    alignas(64) u32 v[512][LANES];  // the accumulation registers from 256 on
    u32 s[128], scc, epoch;
    i32 pc, barrier, number;
    bool done, waiting, scalar_loads;
    i32 v_pending[512], s_pending[128];  // the record of the load that fills a register, -1 if none is under way
    std::deque<i32> vm, lgkm;            // records in the order in which they are waited for
    Machine* machine;
    u64 steps;

    u64 pair(int r) const { return s[r] | u64(s[r + 1]) << 32; }
    u64 exec() const { return pair(EXEC); }
    bool active(int lane) const { return exec() >> lane & 1; }
    void set(int r, u32 x) { s[r] = x, s_pending[r] = -1; }
    void set_pair(int r, u64 x) { set(r, u32(x)), set(r + 1, u32(x >> 32)); }
};

inline i32 number_of(Wave& w, const Instruction& i) { return i32(&i - w.machine->launch.code); }
inline void found(Wave& w, const Instruction& i, Kind kind, int lane, u64 address) {
    Machine& m = *w.machine;
    if (m.launch.found[kind]++ < 8 && m.findings < m.launch.findings_size)
        m.launch.findings[m.findings++] = {kind, u32(number_of(w, i)), m.workgroup, w.number, lane, 0, address};
    m.failed |= kind == ENDLESS || kind == UNSUPPORTED;
}

// Nothing may read a register before its load was waited for.
inline void check(Wave& w, const Instruction& i, i32& pending, int r) {
    if (pending < 0) return;
    if (w.machine->records[pending].retired == NEVER) found(w, i, REGISTER_READ_BEFORE_ITS_LOAD_WAS_WAITED_FOR, -1, r);
    else pending = -1;
}
inline void check_vector(Wave& w, const Instruction& i, int r, int number = 1) {
    for (int k = r; k < r + number; k++) check(w, i, w.v_pending[k], k);
}
inline u32 scalar_register(Wave& w, const Instruction& i, int r) { return check(w, i, w.s_pending[r], r), w.s[r]; }
inline u64 scalar_pair(Wave& w, const Instruction& i, int r) {
    return check(w, i, w.s_pending[r], r), check(w, i, w.s_pending[r + 1], r + 1), w.pair(r);
}
