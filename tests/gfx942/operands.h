// What instructions read and write, and families of them that differ in a function.
#pragma once
#include <string>
#include <tuple>
#include <unordered_map>

#include "memory.h"
#include "numbers.h"

using Operation = void (*)(Wave&, const Instruction&);
inline std::vector<Operation> operations;
inline std::unordered_map<std::string, int> numbers;
inline void define(const std::string& name, Operation run) {
    numbers[name] = int(operations.size());
    operations.push_back(run);
}

template <class T> T constant(const Operand& o) {
    return from_bits<T>(sizeof(T) == 8               ? (FLOAT<T> ? o.float64 : o.int64)
                        : FLOAT<T> && sizeof(T) == 2 ? o.half
                                                     : o.bits);
}
template <class T> T scalar_source(Wave& w, const Instruction& i, int k) {
    const Operand& o = i.source[k];
    if (o.place == VECTOR) found(w, i, UNSUPPORTED, 0, 1);
    if (o.place != SCALAR) return constant<T>(o);
    if (sizeof(T) == 8) return from_bits<T>(scalar_pair(w, i, o.index));
    return from_bits<T>((scalar_register(w, i, o.index) & o.mask) >> o.shift);
}
template <class T> void write_scalar(Wave& w, const Instruction& i, T x) {
    if (sizeof(T) == 8) w.set_pair(i.out.index, x);
    else w.set(i.out.index, u32(x));
}
// Source k in each lane, with its modifiers.
template <class T> Row<T> source(Wave& w, const Instruction& i, int k) {
    const Operand& o = i.source[k];
    Row<T> out;
    if (o.place == VECTOR) {
        check_vector(w, i, o.index, sizeof(T) == 8 ? 2 : 1);
        const u32 *low = w.v[o.index], *high = w.v[o.index + 1];
        Row<u32> part;
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
    if constexpr (FLOAT<T>)
        if (o.negate | o.absolute) {
            const Bits<T> kept = o.absolute ? ~SIGN<T> : ~Bits<T>(0), flipped = o.negate ? SIGN<T> : 0;
            EACH out[l] = from_bits<T>((bits(out[l]) & kept) ^ flipped);
        }
    return out;
}
// The lanes that an instruction writes.
inline u64 written(Wave& w, const Instruction& i) {
    if (!i.dpp) return w.exec();
    u64 mask = 0;
    EACH
        if (w.active(l) && i.row_mask >> (l >> 4) & 1 && i.bank_mask >> (l >> 2 & 3) & 1) {
            const bool there = i.lanes[l] >= 0, active = there && w.active(i.lanes[l]);
            if (there && !active) found(w, i, DPP_OF_AN_INACTIVE_LANE, l, i.lanes[l]);
            mask |= u64(active || i.bound_ctrl) << l;
        }
    return mask;
}
inline void write_register(Wave& w, int r, const Row<u32>& x, u64 mask) {
    w.v_pending[r] = -1;
    if (mask == ~0ull) std::memcpy(w.v[r], x.data(), sizeof x);
    else EACH w.v[r][l] = mask >> l & 1 ? x[l] : w.v[r][l];
}
template <class T> void write(Wave& w, const Instruction& i, const Row<T>& x) {
    const u64 mask = written(w, i);
    Row<u32> part;
    EACH part[l] = u32(bits(x[l]));
    write_register(w, i.out.index, part, mask);
    if constexpr (sizeof(T) == 8) {
        EACH part[l] = u32(bits(x[l]) >> 32);
        write_register(w, i.out.index + 1, part, mask);
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
        const u64 mask = i.mask_in.place == SCALAR ? scalar_pair(w, i, i.mask_in.index) : 0;
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
template <class F> void save_exec(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        const u64 before = w.exec(), after = F{}(scalar_source<u64>(w, i, 0), before);
        w.set_pair(i.out.index, before), w.set_pair(EXEC, after), w.scc = after != 0;
    });
}
template <class F> void jump(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        if (F{}(w, i)) w.pc = i.target;
    });
}
// Word `second` of source k, without modifiers.
inline Row<u32> word(Wave& w, const Instruction& i, int k, int second) {
    const Operand& o = i.source[k];
    Row<u32> out;
    if (o.place == VECTOR)
        check_vector(w, i, o.index + second), std::memcpy(out.data(), w.v[o.index + second], sizeof out);
    else out.fill(o.place == SCALAR ? scalar_register(w, i, o.index + second) : o.bits);
    return out;
}
// Two float32 in a register pair; op_sel and op_sel_hi choose the halves for the low and the high result.
template <class F> void packed(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        Row<u32> in[3], out[2];
        for (int half = 0; half < 2; half++) {
            for (int k = 0; k < 3 && i.source[k].place != NONE; k++) {
                const bool second = (half ? i.op_sel_hi : i.op_sel)[k], flipped = (half ? i.neg_hi : i.neg_lo)[k];
                if (i.source[k].place == CONSTANT && second) found(w, i, HIGH_HALF_OF_A_CONSTANT, k, 0);
                in[k] = word(w, i, k, second);
                EACH in[k][l] ^= flipped ? SIGN<f32> : 0;
            }
            EACH out[half][l] = bits(F{}(to_f32(in[0][l]), to_f32(in[1][l]), to_f32(in[2][l])));
        }
        write_register(w, i.out.index, out[0], w.exec()), write_register(w, i.out.index + 1, out[1], w.exec());
    });
}
// a · b + c of float32 and float16 operands: op_sel_hi says which are float16, op_sel which half; neg_hi is |x| here.
// The sum goes to a register, or (LOW) to its low half.
template <bool LOW> void mixed(Wave& w, const Instruction& i) {
    Row<f64> in[3];
    Row<u32> out;
    for (int k = 0; k < 3; k++) {
        const Operand& o = i.source[k];
        const Row<u32> x = source<u32>(w, i, k);
        EACH {
            const u32 half = o.place == CONSTANT ? o.half : o.place == VECTOR && i.op_sel[k] ? x[l] >> 16 : x[l];
            f32 value = i.op_sel_hi[k] ? f32(from_bits<f16>(half)) : to_f32(x[l]);
            if (i.neg_hi[k] | o.absolute) value = std::fabs(value);
            in[k][l] = i.neg_lo[k] | o.negate ? -value : value;
        }
    }
    EACH {
        const f64 sum = std::fma(in[0][l], in[1][l], in[2][l]);
        out[l] = LOW ? (w.v[i.out.index][l] & 0xffff0000) | bits(f16(sum)) : bits(f32(sum));
    }
    write(w, i, out);
}
// Lane l gets from lane `from` what is in source k.
template <class F> void exchange(Wave& w, const Instruction& i, int k, F from) {
    const Row<u32> x = source<u32>(w, i, k);
    Row<u32> out;
    EACH out[l] = w.active(from(l)) ? x[from(l)] : 0;
    write(w, i, out), w.v_pending[i.out.index] = new_record(w, true);
}

// Matrix products: D = A B + C, in the order of k with one rounding each (the hardware's order is not documented).
enum Entry { FLOAT32, FLOAT16, BFLOAT16, XFLOAT32 };
template <int M, Entry TYPE, int PER_LANE> void matrix(Wave& w, const Instruction& i) {
    constexpr int GROUPS = LANES / M, K = PER_LANE * GROUPS, OUT = M * M / LANES;
    constexpr bool NARROW = TYPE == FLOAT16 || TYPE == BFLOAT16;
    static f32 a[K][M], b[K][M], c[M][M];
    auto word = [&](int k, int r, int l) {
        const Operand& o = i.source[k];
        return o.place == VECTOR ? w.v[o.index + r][l] : o.bits;
    };
    auto entry = [&](int k, int e, int l) {
        u32 x = word(k, NARROW ? e / 2 : e, l), half = NARROW && e & 1 ? x >> 16 : x & 0xffff;
        if (TYPE == XFLOAT32 && (x & 0x7f800000) != 0x7f800000) x = (x + 0xfff + (x >> 13 & 1)) & ~0x1fffu;
        return TYPE == FLOAT16 ? f32(from_bits<f16>(half)) : to_f32(TYPE == BFLOAT16 ? half << 16 : x);
    };
    auto row = [](int r, int l) { return r / 4 * (4 * GROUPS) + 4 * (l / M) + r % 4; };
    for (int k = 0; k < 3; k++)
        if (i.source[k].place == VECTOR)
            check_vector(w, i, i.source[k].index, k == 2 ? OUT : NARROW ? PER_LANE / 2 : PER_LANE);
    EACH
        for (int e = 0; e < PER_LANE; e++) {
            int k = l / M * PER_LANE + e;
            a[k][l % M] = entry(0, e, l), b[k][l % M] = entry(1, e, l);
        }
    EACH
        for (int r = 0; r < OUT; r++) c[row(r, l)][l % M] = to_f32(word(2, r, l));
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < M; n++) c[m][n] = std::fma(a[k][m], b[k][n], c[m][n]);
    EACH
        for (int r = 0; r < OUT; r++) w.v[i.out.index + r][l] = bits(c[row(r, l)][l % M]);
    std::fill_n(w.v_pending + i.out.index, OUT, -1);
}
