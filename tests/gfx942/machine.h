// A compute unit of an MI300X (gfx942) as far as code can see it: registers, LDS, memory, and what is found in them.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

// clang-format off
using u8 = uint8_t;   using u16 = uint16_t;  using u32 = uint32_t;  using u64 = uint64_t;
using i8 = int8_t;    using i16 = int16_t;   using i32 = int32_t;   using i64 = int64_t;
using f16 = _Float16; using f32 = float;     using f64 = double;

// What is looked for. build.py reads these names, and the structures that follow.
enum Kind : u32 {
    NOTHING, OUT_OF_BOUNDS, LDS_OUT_OF_BOUNDS, LDS_READ_BEFORE_WRITTEN, LDS_RACE, LDS_NOT_WAITED_FOR_BEFORE_THE_BARRIER,
    RACE_BETWEEN_WORKGROUPS, RACE, NOT_WAITED_FOR_BEFORE_THE_BARRIER, REGISTER_READ_BEFORE_ITS_LOAD_WAS_WAITED_FOR,
    WAVES_AT_DIFFERENT_BARRIERS, DPP_OF_AN_INACTIVE_LANE, ENDLESS, HIGH_HALF_OF_A_CONSTANT, MISALIGNED, UNSUPPORTED,
    SAME_VALUE_STORED_TWICE
};
// clang-format on

constexpr int LANES = 64, VCC = 106, EXEC = 126, CONFLICT = -2;
constexpr u32 NEVER = ~0u, POISON = 0x7fa5c3e1;  // a signalling NaN: what registers and LDS hold at the start
#define EACH for (int l = 0; l < LANES; l++)
template <class T> using Row = std::array<T, LANES>;

enum Place : u8 { NONE, VECTOR, SCALAR, CONSTANT, OFF };
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

struct Finding {
    u32 kind, instruction;
    i32 workgroup, wave, lane;
};

// An access of a wave: its epoch (the number of barriers before it), and that in which it was waited for.
struct Record {
    i32 wave;
    u32 issued, retired;
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
    i32 order;
};

struct Machine {
    const Launch& launch;
    std::vector<Shadow> shadows;  // the first one is of the LDS
    std::vector<Record> records;
    std::vector<u8> lds;
    i32 workgroup, findings;
    bool failed;
};

struct Wave {
    alignas(64) u32 v[512][LANES];  // the accumulation registers from 256 on
    u32 s[128], scc, epoch;
    i32 v_pending[512], s_pending[128];  // the record of the load that fills a register, -1 if none is under way
    std::deque<i32> vm, lgkm;            // records in the order in which they are waited for
    bool done, waiting, scalar_loads;
    i32 number;
    u64 steps;
    const Instruction *next, *now;
    Machine* machine;

    void found(Kind kind, int lane = -1) {
        Machine& m = *machine;
        if (m.launch.found[kind]++ < 8 && m.findings < m.launch.findings_size)
            m.launch.findings[m.findings++] = {kind, u32(now - m.launch.code), m.workgroup, number, lane};
        m.failed |= kind == ENDLESS || kind == UNSUPPORTED;
    }
    // Nothing may read a register before its load was waited for.
    void check(i32& pending) {
        if (pending < 0) return;
        if (machine->records[pending].retired == NEVER) found(REGISTER_READ_BEFORE_ITS_LOAD_WAS_WAITED_FOR);
        else pending = -1;
    }
    void check_vector(int r, int count) {
        std::for_each_n(v_pending + r, count, [&](i32& pending) { check(pending); });
    }
    u32 scalar(int r) { return check(s_pending[r]), s[r]; }
    u64 scalar_pair(int r) { return scalar(r) | u64(scalar(r + 1)) << 32; }
    u64 exec() const { return s[EXEC] | u64(s[EXEC + 1]) << 32; }
    bool active(int lane) const { return exec() >> lane & 1; }
    void set(int r, u32 x) { s[r] = x, s_pending[r] = -1; }
    void set_lane(int r, int lane, u32 x) { v[r][lane] = x, v_pending[r] = -1; }
    void set_pair(int r, u64 x) { set(r, u32(x)), set(r + 1, u32(x >> 32)); }

    i32 new_record(std::deque<i32>& queue) {
        queue.push_back(i32(machine->records.size()));
        machine->records.push_back({number, epoch, NEVER});
        return queue.back();
    }
    void retire(std::deque<i32>& queue, int left) {
        for (; int(queue.size()) > left; queue.pop_front()) machine->records[queue.front()].retired = epoch;
    }
};

// The same bits, or NaN in both, whose payload depends on the order of operands.
inline bool same_value(const u8* a, const u8* b, int n) {
    if (n < 4) return !std::memcmp(a, b, n);
    for (int k = 0; k < n; k += 4) {
        f32 x, y;
        std::memcpy(&x, a + k, 4), std::memcpy(&y, b + k, 4);
        if (std::memcmp(&x, &y, 4) && (x == x || y == y)) return false;
    }
    return true;
}

// What an instruction does to memory or LDS.
template <bool STORE, bool LDS> struct Access {
    Wave& w;
    const i32 record;
    int lane = -1;

    void touch(u64 a, int n, void* value) const {
        const Launch& launch = w.machine->launch;
        auto inside = [&](const Region& region) { return region.holds(a, n); };
        if (LDS ? a + n > launch.lds : std::none_of(launch.regions, launch.regions + launch.regions_size, inside)) {
            w.found(LDS ? LDS_OUT_OF_BOUNDS : OUT_OF_BOUNDS, lane);
            if (!STORE) std::memset(value, 0xA5, n);
            return;
        }
        u8 *memory = LDS ? &w.machine->lds[a] : reinterpret_cast<u8*>(a), *given = static_cast<u8*>(value);
        const bool same = STORE && same_value(memory, given, n);
        STORE ? std::memcpy(memory, given, n) : std::memcpy(given, memory, n);
        for (Shadow& shadow : w.machine->shadows)
            if (inside(shadow.region)) return compare(shadow, a - shadow.region.low, n, same);
    }
    // With what other waves and workgroups did. A store of the value that is there already (`same`) harms no one.
    void compare(Shadow& shadow, u64 a, int n, bool same) const {
        Machine& m = *w.machine;
        const i32 own = m.workgroup;
        auto elsewhere = [&](i32 other) { return other != -1 && other != own; };
        i32 fine = -1;  // most of the cells have the same records
        auto beside = [&](i32 other) {
            if (other == fine || other < 0 || same || m.records[other].wave == w.number) return;
            if (m.records[other].issued == w.epoch) w.found(shadow.race, lane);
            else if (m.records[other].retired >= w.epoch) w.found(shadow.not_waited, lane);
            else fine = other;
        };
        for (u64 g = a >> shadow.shift; g <= (a + n - 1) >> shadow.shift; g++) {
            Cell& cell = shadow.cells[g];
            if (LDS && !STORE && cell.writer == -1) w.found(LDS_READ_BEFORE_WRITTEN, lane);
            if (elsewhere(cell.writer) || (STORE && elsewhere(cell.reader)))
                w.found(STORE && same ? SAME_VALUE_STORED_TWICE : RACE_BETWEEN_WORKGROUPS, lane);
            if (cell.writer == own) beside(cell.written);
            if (STORE && cell.reader == own) beside(cell.read[0]), beside(cell.read[1]);
            if (STORE) {
                cell.writer = own, cell.written = record;
            } else if (elsewhere(cell.reader)) {
                cell.reader = CONFLICT;
            } else {
                if (cell.reader != own) cell.read[0] = cell.read[1] = -1;
                const bool mine = cell.read[0] < 0 || m.records[cell.read[0]].wave == w.number;
                cell.read[mine ? 0 : 1] = record, cell.reader = own;
            }
        }
    }
};

// Move the values of each lane from or to where `move` says, which gets the access, and the words of value k.
template <bool STORE, bool LDS, class F> void transfer(Wave& w, const Instruction& i, const Operand* stored, F move) {
    const int words = (i.bytes + 3) / 4;
    auto place = [&](int k) { return STORE ? stored[k].index : i.out.index + k * words; };
    for (int k = 0; STORE && k <= i.pair; k++) w.check_vector(place(k), words);
    Access<STORE, LDS> access{w, w.new_record(LDS ? w.lgkm : w.vm)};
    EACH if (w.active(l)) for (int k = 0; k <= i.pair; k++) {
        u32 value[4] = {};
        access.lane = l;
        for (int x = 0; STORE && x < words; x++) value[x] = w.v[place(k) + x][l] >> 16 * i.high;
        move(access, k, value);
        for (int x = 0; !STORE && x < words; x++) w.v[place(k) + x][l] = value[x];
    }
    if (!STORE) std::fill_n(w.v_pending + i.out.index, words * (1 + i.pair), access.record);
}
// Through a descriptor: what is beyond its size reads as 0, and is not written.
template <bool STORE> void buffer(Wave& w, const Instruction& i) {
    const Operand &offset = i.source[STORE], &description = i.source[STORE + 1], &shift = i.source[STORE + 2];
    const u64 base = w.scalar_pair(description.index), limit = u32(w.scalar_pair(description.index + 2));
    const u64 start = shift.place == SCALAR ? w.scalar(shift.index) : shift.bits, size = limit - std::min(limit, start);
    if (base >> 63) w.found(UNSUPPORTED);
    if (i.offen) w.check_vector(offset.index, 1);
    transfer<STORE, false>(w, i, i.source, [&](const auto& access, int, u32* value) {
        const u64 a = (i.offen ? w.v[offset.index][access.lane] : 0) + u64(i.offset[0]);
        const int n = a + i.bytes <= size ? i.bytes : std::min<int>(i.bytes, 4);
        for (int k = 0; k < i.bytes && a + k + n <= size; k += n)
            access.touch((base & 0xFFFFFFFFFFFF) + start + a + k, n, value + k / 4);
    });
}
template <bool STORE> void global(Wave& w, const Instruction& i) {
    const Operand &address = i.source[0], &base = i.source[STORE ? 2 : 1];
    const bool relative = base.place == SCALAR;
    w.check_vector(address.index, relative ? 1 : 2);
    const u64 start = (relative ? w.scalar_pair(base.index) : 0) + i64(i.offset[0]);
    transfer<STORE, false>(w, i, i.source + 1, [&](const auto& access, int, u32* value) {
        const u32 *low = w.v[address.index], *high = w.v[address.index + 1];
        access.touch(start + low[access.lane] + (relative ? 0 : u64(high[access.lane]) << 32), i.bytes, value);
    });
}
template <bool STORE> void lds(Wave& w, const Instruction& i) {
    w.check_vector(i.source[0].index, 1);
    Row<u32> address;
    std::copy_n(w.v[i.source[0].index], LANES, address.begin());
    transfer<STORE, true>(w, i, i.source + 1, [&](const auto& access, int k, u32* value) {
        const u32 a = address[access.lane] + i.offset[k];
        if (a % (i.pair ? i.bytes : std::min<int>(i.bytes, 8))) w.found(MISALIGNED, access.lane);
        access.touch(a, i.bytes, value);
    });
}
inline void scalar_load(Wave& w, const Instruction& i) {
    const u64 a = (w.scalar_pair(i.source[0].index) & ~3ull) + i.source[1].bits;
    const Access<false, false> access{w, w.new_record(w.lgkm)};
    access.touch(a, i.bytes, w.s + i.out.index);
    std::fill_n(w.s_pending + i.out.index, i.bytes / 4, access.record);
    w.scalar_loads = true;
}
