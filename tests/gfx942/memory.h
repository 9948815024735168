// Accesses of memory and of LDS, compared with those of other waves and workgroups.
#pragma once
#include <array>
#include <cstring>

#include "machine.h"

template <class T> using Row = std::array<T, LANES>;

inline i32 new_record(Wave& w, bool lgkm) {
    i32 number = i32(w.machine->records.size());
    w.machine->records.push_back({u32(w.number), w.epoch, NEVER});
    (lgkm ? w.lgkm : w.vm).push_back(number);
    return number;
}
inline void retire(Wave& w, std::deque<i32>& queue, int left) {
    for (; int(queue.size()) > left; queue.pop_front()) w.machine->records[queue.front()].retired = w.epoch;
}
// The same bits, or NaN in both, whose payload depends on the order of operands.
inline bool same_value(const u8* a, const u8* b, int n) {
    if (!std::memcmp(a, b, n)) return true;
    auto nan = [](u32 x) { return (x & 0x7fffffff) > 0x7f800000; };
    for (int k = 0; k < n; k += 4) {
        u32 x, y;
        if (n & 3) return false;
        std::memcpy(&x, a + k, 4), std::memcpy(&y, b + k, 4);
        if (x != y && !(nan(x) && nan(y))) return false;
    }
    return true;
}

// What an instruction does in a lane.
struct Access {
    Wave& w;
    const Instruction& i;
    const bool store, lds;
    const i32 record = new_record(w, lds);
    int lane = -1;

    void found(Kind kind, u64 a) const { ::found(w, i, kind, lane, a); }
    void touch(u64 a, int n, void* value) const {
        Machine& m = *w.machine;
        if (lds ? a + n > m.lds.size() : !m.inside(a, n)) {
            found(lds ? LDS_OUT_OF_BOUNDS : OUT_OF_BOUNDS, a);
            if (!store) std::memset(value, 0xA5, n);
            return;
        }
        u8 *memory = lds ? &m.lds[a] : reinterpret_cast<u8*>(a), *given = static_cast<u8*>(value);
        const bool same = store && same_value(memory, given, n);
        store ? std::memcpy(memory, given, n) : std::memcpy(given, memory, n);
        for (Shadow& shadow : m.shadows)
            if (shadow.region.holds(a, 1)) return track(shadow, a, n, same);
    }
    // A store of the value that is there already (`same`) harms no one.
    void track(Shadow& shadow, u64 a, int n, bool same) const {
        Machine& m = *w.machine;
        const i32 own = m.workgroup;
        auto elsewhere = [&](i32 other) { return other != -1 && other != own; };
        auto beside = [&](i32 other) {
            if (other < 0 || same) return;
            const Record& r = m.records[other];
            if (int(r.wave) == w.number) return;
            if (r.issued == w.epoch) found(shadow.race, a);
            else if (r.retired >= w.epoch) found(shadow.not_waited, a);
        };
        for (u64 g = (a - shadow.region.low) >> shadow.shift; g <= (a + n - 1 - shadow.region.low) >> shadow.shift;
             g++) {
            Cell& cell = shadow.cells[g];
            if (lds && !store && cell.writer == -1) found(LDS_READ_BEFORE_WRITTEN, a);
            if (elsewhere(cell.writer) || (store && elsewhere(cell.reader)))
                found(store && same ? SAME_VALUE_STORED_TWICE : RACE_BETWEEN_WORKGROUPS, a);
            if (cell.writer == own) beside(cell.written);
            if (store && cell.reader == own) beside(cell.read[0]), beside(cell.read[1]);
            if (store) {
                cell.writer = own, cell.written = record;
            } else if (elsewhere(cell.reader)) {
                cell.reader = CONFLICT;
            } else {
                if (cell.reader != own) cell.read[0] = cell.read[1] = -1;
                bool mine = cell.read[0] < 0 || int(m.records[cell.read[0]].wave) == w.number;
                cell.read[mine ? 0 : 1] = record, cell.reader = own;
            }
        }
    }
};

// Move the values of each lane from or to where `move` says, which gets the access, and the words of value k.
template <bool STORE, class F> void transfer(Wave& w, const Instruction& i, const Operand* stored, bool lds, F move) {
    const int words = (i.bytes + 3) / 4;
    auto place = [&](int k) { return STORE ? stored[k].index : i.out.index + k * words; };
    for (int k = 0; STORE && k <= i.pair; k++) check_vector(w, i, place(k), words);
    Access access{w, i, STORE, lds};
    EACH
        if (w.active(l))
            for (int k = 0; k <= i.pair; k++) {
                u32 value[4] = {};
                access.lane = l;
                for (int x = 0; STORE && x < words; x++) value[x] = w.v[place(k) + x][l] >> 16 * i.high;
                move(access, k, value);
                for (int x = 0; !STORE && x < words; x++) w.v[place(k) + x][l] = value[x];
            }
    for (int x = 0; !STORE && x < words * (1 + i.pair); x++) w.v_pending[i.out.index + x] = access.record;
}
// Through a descriptor: what is beyond its size reads as 0, and is not written.
template <bool STORE> void buffer(Wave& w, const Instruction& i) {
    const Operand &offset = i.source[STORE], &description = i.source[STORE + 1], &shift = i.source[STORE + 2];
    const u64 base = scalar_pair(w, i, description.index), limit = scalar_pair(w, i, description.index + 2);
    const u32 start = shift.place == SCALAR ? scalar_register(w, i, shift.index) : shift.bits;
    const u64 size = u32(limit) > start ? u32(limit) - start : 0;
    if (base >> 63) found(w, i, UNSUPPORTED, 0, 2);
    if (i.offen) check_vector(w, i, offset.index);
    transfer<STORE>(w, i, i.source, false, [&](const Access& access, int, u32* value) {
        const u64 a = (i.offen ? w.v[offset.index][access.lane] : 0) + u64(i.offset[0]);
        const int n = a + i.bytes <= size ? i.bytes : std::min<int>(i.bytes, 4);
        for (int k = 0; k < i.bytes && a + k + n <= size; k += n)
            access.touch((base & 0xFFFFFFFFFFFF) + start + a + k, n, value + k / 4);
    });
}
template <bool STORE> void global(Wave& w, const Instruction& i) {
    const Operand &address = i.source[0], &base = i.source[STORE ? 2 : 1];
    const bool relative = base.place == SCALAR;
    check_vector(w, i, address.index, relative ? 1 : 2);
    const u64 start = (relative ? scalar_pair(w, i, base.index) : 0) + i64(i.offset[0]);
    transfer<STORE>(w, i, i.source + 1, false, [&](const Access& access, int, u32* value) {
        const u32 *low = w.v[address.index], *high = w.v[address.index + 1];
        access.touch(start + low[access.lane] + (relative ? 0 : u64(high[access.lane]) << 32), i.bytes, value);
    });
}
template <bool STORE> void lds(Wave& w, const Instruction& i) {
    check_vector(w, i, i.source[0].index);
    Row<u32> address;
    std::memcpy(address.data(), w.v[i.source[0].index], sizeof address);
    transfer<STORE>(w, i, i.source + 1, true, [&](const Access& access, int k, u32* value) {
        const u32 a = address[access.lane] + i.offset[k];
        if (a % (i.pair ? i.bytes : std::min<int>(i.bytes, 8))) access.found(MISALIGNED, a);
        access.touch(a, i.bytes, value);
    });
}
inline void scalar_load(Wave& w, const Instruction& i) {
    const Operand &base = i.source[0], &offset = i.source[1];
    const u64 start = scalar_pair(w, i, base.index) & ~3ull;
    Access access{w, i, false, false, new_record(w, true)};
    u32 value[16];
    access.touch(start + (offset.place == SCALAR ? scalar_register(w, i, offset.index) : offset.bits), i.bytes, value);
    for (int k = 0; k < i.bytes / 4; k++) w.s[i.out.index + k] = value[k], w.s_pending[i.out.index + k] = access.record;
    w.scalar_loads = true;
}
