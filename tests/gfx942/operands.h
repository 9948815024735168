// What instructions read and write, and families of them that differ in a function.
#pragma once
#include <string>
#include <tuple>
#include <unordered_map>

#include "numbers.h"

using Operation = void (*)(Wave&, const Instruction&);
inline std::vector<Operation> operations;
inline std::unordered_map<std::string, int> numbers;
inline void define(const std::string& name, Operation run) {
    numbers[name] = int(operations.size());
    operations.push_back(run);
}

// Two float32 in a register pair, the halves that op_sel and op_sel_hi choose.
struct Pair {
    f32 low, high;
};
// A float16 (op_sel_hi), one of the two in a register (op_sel), or a float32.
struct Mixed {
    f32 value;
};
inline f64 fma(Mixed x, Mixed y, Mixed z) { return std::fma(f64(x.value), f64(y.value), f64(z.value)); }
template <class T> constexpr bool FLOAT = std::is_floating_point_v<T> || std::is_same_v<T, f16>;

template <class T> T scalar_source(Wave& w, const Instruction& i, int k) {
    const Operand& o = i.source[k];
    if (o.place == VECTOR) w.found(UNSUPPORTED);
    if (o.place == SCALAR)
        return from_bits<T>(sizeof(T) == 8 ? w.scalar_pair(o.index) : (w.scalar(o.index) & o.mask) >> o.shift);
    const u64 wide = std::is_floating_point_v<T> ? o.float64 : std::is_integral_v<T> ? o.int64 : o.bits;
    return from_bits<T>(sizeof(T) == 8 ? wide : std::is_same_v<T, f16> ? o.half : o.bits);
}
template <class T> void write_scalar(Wave& w, const Instruction& i, T x) {
    if (sizeof(T) == 8) w.set_pair(i.out.index, x);
    else w.set(i.out.index, u32(x));
}
// Parts and signs of source k.
template <class T> void select(Wave& w, const Instruction& i, int k, Row<T>& out) {
    const Operand& o = i.source[k];
    const bool constant = o.place == CONSTANT, negative = o.negate | i.neg_lo[k];
    if constexpr (std::is_same_v<T, Pair>) {
        if (constant && (i.op_sel[k] | i.op_sel_hi[k])) w.found(HIGH_HALF_OF_A_CONSTANT);
        EACH {
            const f32 low = i.op_sel[k] ? out[l].high : out[l].low, high = i.op_sel_hi[k] ? out[l].high : out[l].low;
            out[l] = {i.neg_lo[k] ? -low : low, i.neg_hi[k] ? -high : high};
        }
    } else if constexpr (std::is_same_v<T, Mixed>) {
        const bool shift = o.place == VECTOR && i.op_sel[k];
        EACH {
            const u32 half = constant ? o.half : bits(out[l]) >> 16 * shift;
            const f32 x = i.op_sel_hi[k] ? half_to_f32(half) : out[l].value;
            const f32 magnitude = i.neg_hi[k] | o.absolute ? std::fabs(x) : x;  // neg_hi is |x| here
            out[l].value = negative ? -magnitude : magnitude;
        }
    } else if (FLOAT<T> && (o.negate | o.absolute)) {
        const Bits<T> kept = o.absolute ? ~SIGN<T> : ~Bits<T>(0), flipped = o.negate ? SIGN<T> : 0;
        EACH out[l] = from_bits<T>((bits(out[l]) & kept) ^ flipped);
    }
}
// Source k in each lane, with its modifiers.
template <class T> Row<T> source(Wave& w, const Instruction& i, int k) {
    const Operand& o = i.source[k];
    Row<T> out;
    if (o.place == VECTOR) {
        const u32 *low = w.v[o.index], *high = w.v[o.index + 1];
        Row<u32> part;
        w.check_vector(o.index, sizeof(T) == 8 ? 2 : 1);
        if (i.dpp && k == 0) {
            EACH part[l] = i.lanes[l] >= 0 && w.active(i.lanes[l]) ? low[i.lanes[l]] : 0;
            low = part.data();
        } else if (o.mask != ~0u) {
            EACH part[l] = (low[l] & o.mask) >> o.shift;
            low = part.data();
        }
        if constexpr (sizeof(T) == 8) EACH out[l] = from_bits<T>(low[l] | u64(high[l]) << 32);
        else EACH out[l] = from_bits<T>(low[l]);
    } else {
        out.fill(scalar_source<T>(w, i, k));
    }
    select(w, i, k, out);
    return out;
}
// The lanes that an instruction writes.
inline u64 written(Wave& w, const Instruction& i) {
    if (!i.dpp) return w.exec();
    u64 mask = 0;
    EACH if (w.active(l) && i.row_mask >> (l >> 4) & 1 && i.bank_mask >> (l >> 2 & 3) & 1) {
        const bool there = i.lanes[l] >= 0, active = there && w.active(i.lanes[l]);
        if (there && !active) w.found(DPP_OF_AN_INACTIVE_LANE, l);
        mask |= u64(active || i.bound_ctrl) << l;
    }
    return mask;
}
template <class T> void write(Wave& w, const Instruction& i, const Row<T>& x) {
    const u64 mask = written(w, i);
    for (int k = 0; k < 1 + (sizeof(T) == 8); k++) {
        u32* v = w.v[i.out.index + k];
        w.v_pending[i.out.index + k] = -1;
        if (mask == ~0ull) EACH v[l] = u32(u64(bits(x[l])) >> 32 * k);
        else EACH v[l] = mask >> l & 1 ? u32(u64(bits(x[l])) >> 32 * k) : v[l];
    }
}
inline void write_mask(Wave& w, const Operand& o, const Row<bool>& x) {
    u64 mask = 0;
    EACH mask |= u64(x[l]) << l;
    w.set_pair(o.index, mask & w.exec());
}

// Families of instructions. F is a function without state, so that its type is all that a template needs.

template <class To, class... From, class F> void vector(const std::string& name, F) {  // a bool goes to a mask
    define(name, [](Wave& w, const Instruction& i) {
        int k = 0;
        std::tuple<Row<From>...> in{source<From>(w, i, k++)...};
        Row<To> out;
        EACH out[l] = To(std::apply([&](const auto&... row) { return F{}(row[l]...); }, in));
        if constexpr (std::is_same_v<To, bool>) write_mask(w, i.out, out);
        else write(w, i, out);
    });
}
// F is also given, and may set, the lane's bit of a mask.
template <class To, class... From, class F> void masked(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        int k = 0;
        std::tuple<Row<From>...> in{source<From>(w, i, k++)...};
        const u64 mask = i.mask_in.place == SCALAR ? w.scalar_pair(i.mask_in.index) : 0;
        Row<To> out;
        Row<bool> flag;
        EACH flag[l] = mask >> l & 1;
        EACH out[l] = To(std::apply([&](const auto&... row) { return F{}(flag[l], row[l]...); }, in));
        write(w, i, out);
        if (i.mask_out.place == SCALAR) write_mask(w, i.mask_out, flag);
    });
}
template <class To, class... From, class F> void scalar(const std::string& name, F) {  // To = void: SCC alone
    define(name, [](Wave& w, const Instruction& i) {
        int k = 0;
        std::tuple<u32&, From...> in{w.scc, scalar_source<From>(w, i, k++)...};
        if constexpr (std::is_void_v<To>) w.scc = std::apply(F{}, in);
        else write_scalar(w, i, To(std::apply(F{}, in)));
    });
}
inline void save_exec(Wave& w, const Instruction& i, u64 exec) {
    w.set_pair(i.out.index, w.exec()), w.set_pair(EXEC, exec), w.scc = exec != 0;
}
inline void jump(Wave& w, int target, bool taken) { w.next = taken ? w.machine->launch.code + target : w.next; }
// Lane l gets from lane `from` what is in source k; the address is source 0.
template <class F> void exchange(Wave& w, const Instruction& i, int k, F from) {
    if (k > 0) w.check_vector(i.source[0].index, 1);
    const Row<u32> x = source<u32>(w, i, k);
    Row<u32> out;
    EACH out[l] = w.active(from(l)) ? x[from(l)] : 0;
    write(w, i, out), w.v_pending[i.out.index] = w.new_record(w.lgkm);
}

// Matrix products: D = A B + C, in the order of k with one rounding each (the hardware's order is not documented).
enum Entry { F32, F16, BF16, XF32 };
template <int M, Entry TYPE, int PER_LANE> void matrix(Wave& w, const Instruction& i) {
    constexpr bool NARROW = TYPE == F16 || TYPE == BF16;
    constexpr int GROUPS = LANES / M, K = PER_LANE * GROUPS, OUT = M * M / LANES, IN = NARROW ? PER_LANE / 2 : PER_LANE;
    static f32 a[K][M], b[K][M], c[M][M];
    auto word = [&](const Operand& o, int r, int l) { return o.place == VECTOR ? w.v[o.index + r][l] : o.bits; };
    auto entry = [&](const Operand& o, int e, int l) {
        u32 x = word(o, NARROW ? e / 2 : e, l), half = NARROW && e & 1 ? x >> 16 : x;
        if (TYPE == XF32 && (x & 0x7f800000) != 0x7f800000) x = (x + 0xfff + (x >> 13 & 1)) & ~0x1fffu;
        return TYPE == F16 ? half_to_f32(half) : to_f32(TYPE == BF16 ? half << 16 : x);
    };
    auto row = [](int r, int l) { return r / 4 * (4 * GROUPS) + 4 * (l / M) + r % 4; };
    for (int k = 0; k < 3; k++)
        if (i.source[k].place == VECTOR) w.check_vector(i.source[k].index, k == 2 ? OUT : IN);
    EACH for (int e = 0, k = l / M * PER_LANE; e < PER_LANE; e++, k++) a[k][l % M] = entry(i.source[0], e, l),
                                                                                b[k][l % M] = entry(i.source[1], e, l);
    EACH for (int r = 0; r < OUT; r++) c[row(r, l)][l % M] = to_f32(word(i.source[2], r, l));
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < M; n++) c[m][n] = std::fma(a[k][m], b[k][n], c[m][n]);
    EACH for (int r = 0; r < OUT; r++) w.v[i.out.index + r][l] = bits(c[row(r, l)][l % M]);
    std::fill_n(w.v_pending + i.out.index, OUT, -1);
}
