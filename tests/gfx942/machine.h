// A compute unit of an MI300X (gfx942) as far as code can see it: registers, LDS, memory, and what is checked of each.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f32 = float;
using f64 = double;

constexpr int LANES = 64, VCC = 106, EXEC = 126, CONFLICT = -2;
constexpr u32 NEVER = ~0u, WHOLE = 6;  // WHOLE: an SDWA selection of all 32 bits
constexpr u32 POISON = 0x7fa5c3e1;     // a signalling NaN: what registers and LDS hold at the start
#define EACH for (int l = 0; l < LANES; l++)

enum Place : u8 { NONE, VECTOR, SCALAR, CONSTANT, OFF };

// Where an operand is, its modifiers, and a constant as instructions of each width see it. As in emulator.py.
struct Operand {
    u8 place, negate, absolute, sign_extend, part, unused;
    u16 index;
    u32 bits, half;
    u64 float64, int64;
};

struct Instruction {
    u32 operation;
    i32 target;  // of a branch
    Operand out, carry, source[4];
    i32 offset, offset1, vmcnt, lgkmcnt;
    u8 op_sel[4], op_sel_hi[4], neg_lo[4], neg_hi[4];
    u8 clamp, omod, dpp, dpp_kind, dpp_lanes[4];
    u8 row_mask, bank_mask, bound_ctrl, sdwa, out_part, out_rest, offen, idxen;
};

// What is looked for. As in emulator.py.
enum Kind : u32 {
    OUT_OF_BOUNDS = 1, LDS_OUT_OF_BOUNDS, LDS_UNWRITTEN, LDS_RACE, LDS_NOT_WAITED, WORKGROUP_RACE, RACE, NOT_WAITED,
    PENDING, OTHER_BARRIER, INACTIVE_LANE, ENDLESS, HIGH_CONSTANT, MISALIGNED, UNSUPPORTED, SAME_VALUE, KINDS
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
struct Shadow {
    u64 low, high;
    int shift;  // a cell is 2^shift bytes
    std::vector<Cell> cells;
    Kind race, not_waited;
};
struct Region {
    u64 low, high;
};

// What emulator.py hands over for a launch; order of the waves: 0 rising, 1 falling, 2 one instruction of each in turn.
struct Launch {
    const Instruction* code;
    const u64 *regions, *shadowed;  // pairs: what may be touched, and what is watched
    const u32* user;                // scalar registers at the start
    u64 *count, *found, most_steps;
    Finding* findings;
    i32 size, entry, regions_size, shadowed_size, user_size, findings_size;
    u32 identity[3], grid[3], threads, lds;
    i32 inexact, order;
};

struct Machine {
    const Launch& launch;
    std::vector<Region> regions;
    Region last{0, 0};
    std::vector<Shadow> shadows;
    std::vector<Record> records;
    std::vector<u8> lds, lds_written;
    Shadow lds_shadow;
    i32 workgroup = 0, findings = 0;
    bool failed = false;
};

struct Wave {
    alignas(64) u32 v[512][LANES];  // the accumulation registers from 256 on
    u32 s[128], scc;
    i32 pc, barrier;
    bool done, waiting;
    int number;
    u32 epoch;
    i32 v_pending[512], s_pending[128];  // the record of the load that fills a register, -1 if none is under way
    std::deque<i32> vm, lgkm;            // records in the order in which they are waited for
    bool scalar_loads;
    Machine* machine;
    u64 steps;
    u64 pair(int r) const { return s[r] | u64(s[r + 1]) << 32; }
    void set_pair(int r, u64 x) { s[r] = u32(x), s[r + 1] = u32(x >> 32), s_pending[r] = s_pending[r + 1] = -1; }
    u64 exec() const { return pair(EXEC); }
    bool active(int lane) const { return exec() >> lane & 1; }
};

using Operation = void (*)(Wave&, const Instruction&);
struct Named {
    std::string name;
    Operation run;
};
inline std::vector<Named> operations;
inline std::unordered_map<std::string, int> numbers;
inline void define(const std::string& name, Operation run) {
    numbers[name] = int(operations.size());
    operations.push_back({name, run});
}

inline void found(Wave& w, const Instruction& i, Kind kind, int lane, u64 address) {
    Machine& m = *w.machine;
    if (m.launch.found[kind]++ < 8 && m.findings < m.launch.findings_size)
        m.launch.findings[m.findings++] = {kind, u32(&i - m.launch.code), m.workgroup, w.number, lane, 0, address};
    m.failed |= kind == ENDLESS || kind == UNSUPPORTED;
}

// Registers, which nothing may read before its load was waited for

inline void check(Wave& w, const Instruction& i, i32& pending, int r) {
    if (pending < 0) return;
    if (w.machine->records[pending].retired == NEVER) found(w, i, PENDING, -1, r);
    else pending = -1;
}
inline void check_vector(Wave& w, const Instruction& i, int r, int number = 1) {
    for (int k = r; k < r + number; k++) check(w, i, w.v_pending[k], k);
}
inline u32 scalar_register(Wave& w, const Instruction& i, int r) {
    check(w, i, w.s_pending[r], r);
    return w.s[r];
}
inline u64 scalar_pair(Wave& w, const Instruction& i, int r) {
    u64 low = scalar_register(w, i, r);
    return low | u64(scalar_register(w, i, r + 1)) << 32;
}
inline void write_lanes(Wave& w, int r, const u32* x, u64 mask) {
    w.v_pending[r] = -1;
    if (mask == ~0ull) std::memcpy(w.v[r], x, sizeof w.v[r]);
    else EACH w.v[r][l] = mask >> l & 1 ? x[l] : w.v[r][l];
}

// Memory

inline i32 new_record(Wave& w, bool lgkm) {
    i32 number = i32(w.machine->records.size());
    w.machine->records.push_back({u32(w.number), w.epoch, NEVER});
    (lgkm ? w.lgkm : w.vm).push_back(number);
    return number;
}
inline void retire(Wave& w, std::deque<i32>& queue, int left) {
    for (; int(queue.size()) > left; queue.pop_front()) w.machine->records[queue.front()].retired = w.epoch;
}

// Compare an access with those of other waves. A store of the value that is there already harms no one.
inline void track(Wave& w, const Instruction& i, Shadow& shadow, u64 a, int n, bool store, int lane, i32 record,
                  bool same) {
    Machine& m = *w.machine;
    const i32 own = m.workgroup;
    auto beside = [&](i32 other) {
        if (other < 0 || same) return;
        const Record& r = m.records[other];
        if (int(r.wave) == w.number) return;
        if (r.issued == w.epoch) found(w, i, shadow.race, lane, a);
        else if (r.retired == NEVER || r.retired >= w.epoch) found(w, i, shadow.not_waited, lane, a);
    };
    auto elsewhere = [&](i32 other) { return other != -1 && other != own; };
    for (u64 g = (a - shadow.low) >> shadow.shift; g <= (a + n - 1 - shadow.low) >> shadow.shift; g++) {
        Cell& cell = shadow.cells[g];
        if (elsewhere(cell.writer) || (store && elsewhere(cell.reader)))
            found(w, i, store && same ? SAME_VALUE : WORKGROUP_RACE, lane, a);
        if (cell.writer == own) beside(cell.written);
        if (store && cell.reader == own) beside(cell.read[0]), beside(cell.read[1]);
        if (store) {
            cell.writer = own, cell.written = record;
        } else if (elsewhere(cell.reader)) {
            cell.reader = CONFLICT;
        } else {
            if (cell.reader != own) cell.read[0] = cell.read[1] = -1;
            bool mine = cell.read[0] < 0 || m.records[cell.read[0]].wave == u32(w.number);
            cell.read[mine ? 0 : 1] = record;
            cell.reader = own;
        }
    }
}
inline void track_global(Wave& w, const Instruction& i, u64 a, int n, bool store, int lane, i32 record, bool same) {
    for (auto& shadow : w.machine->shadows)
        if (a >= shadow.low && a < shadow.high) return track(w, i, shadow, a, n, store, lane, record, same);
}
inline bool inside(Machine& m, u64 a, u64 n) {
    auto holds = [&](const Region& r) { return a >= r.low && a + n <= r.high; };
    if (holds(m.last)) return true;
    auto it = std::find_if(m.regions.begin(), m.regions.end(), holds);
    if (it != m.regions.end()) m.last = *it;
    return it != m.regions.end();
}
// The same bits, or NaN in both, whose payload depends on the order of operands.
inline bool same_value(const void* a, const void* b, int n) {
    if (!std::memcmp(a, b, n)) return true;
    auto nan = [](u32 x) { return (x & 0x7fffffff) > 0x7f800000; };
    for (int k = 0; k < n; k += 4) {
        u32 x, y;
        if (n & 3) return false;
        std::memcpy(&x, (const char*)a + k, 4), std::memcpy(&y, (const char*)b + k, 4);
        if (x != y && !(nan(x) && nan(y))) return false;
    }
    return true;
}
inline void load(Wave& w, const Instruction& i, u64 a, int n, void* value, int lane, i32 record) {
    if (!inside(*w.machine, a, n)) {
        found(w, i, OUT_OF_BOUNDS, lane, a);
        std::memset(value, 0xA5, n);
        return;
    }
    std::memcpy(value, (const void*)a, n);
    track_global(w, i, a, n, false, lane, record, false);
}
inline void store(Wave& w, const Instruction& i, u64 a, int n, const void* value, int lane, i32 record) {
    if (!inside(*w.machine, a, n)) return found(w, i, OUT_OF_BOUNDS, lane, a);
    bool same = same_value((const void*)a, value, n);
    std::memcpy((void*)a, value, n);
    track_global(w, i, a, n, true, lane, record, same);
}
inline void lds_access(Wave& w, const Instruction& i, u32 a, int n, void* value, bool store, int lane, i32 record,
                       int align) {
    Machine& m = *w.machine;
    if (u64(a) + n > m.lds.size()) {
        found(w, i, LDS_OUT_OF_BOUNDS, lane, a);
        if (!store) std::memset(value, 0, n);
        return;
    }
    if (a % align) found(w, i, MISALIGNED, lane, a);
    bool same = store && same_value(&m.lds[a], value, n);
    store ? std::memcpy(&m.lds[a], value, n) : std::memcpy(value, &m.lds[a], n);
    track(w, i, m.lds_shadow, a, n, store, lane, record, same);
    for (u32 k = a; k < a + n; k++)
        if (store) m.lds_written[k] = 1;
        else if (!m.lds_written[k]) found(w, i, LDS_UNWRITTEN, lane, a);
}
