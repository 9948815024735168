// An interpreter of AMD CDNA3 (gfx942) code: what each instruction does, and the launch of a grid of workgroups.
// After AMD's document of the instruction set; notes say where that is vague.
#include "machine.h"

// Formats

static f32 to_f32(u32 x) { return std::bit_cast<f32>(x); }
static u32 to_u32(f32 x) { return std::bit_cast<u32>(x); }
static f32 from_half(u32 x) {
    u32 sign = (x & 0x8000) << 16, exponent = x >> 10 & 31, digits = x & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(f32(digits), -24), to_f32(sign));
    return to_f32(exponent == 31 ? sign | 0x7f800000 | digits << 13 | (digits ? 0x400000 : 0)
                                 : sign | (exponent + 112) << 23 | digits << 13);
}
static u32 to_half(f64 x, bool truncate = false) {
    u32 sign = std::signbit(x) ? 0x8000 : 0;
    f64 a = std::fabs(x);
    if (x != x || std::isinf(x)) return sign | (x != x ? 0x7e00 : 0x7c00);
    int e = 0;
    std::frexp(a, &e);
    f64 unit = std::ldexp(1.0, std::max(e - 11, -24));
    a = unit * (truncate ? std::floor(a / unit) : std::nearbyint(a / unit));
    if (a > 65504) return sign | (truncate ? 0x7bff : 0x7c00);
    if (a < 0x1p-14) return sign | u32(a * 0x1p24);
    std::frexp(a, &e);
    return sign | u32(e + 14) << 10 | (u32(std::ldexp(a, 11 - e)) & 1023);
}
struct Half {  // an operand of 16 bits; how it is computed with is float32
    u32 bits;
    operator f32() const { return from_half(bits & 0xffff); }
};
template <class T> constexpr bool FLOAT = std::is_floating_point_v<T> || std::is_same_v<T, Half>;
template <class T> using Bits = std::conditional_t<sizeof(T) == 8, u64, u32>;
template <class T> constexpr Bits<T> SIGN = sizeof(T) == 8 ? Bits<T>(1ull << 63) : std::is_same_v<T, Half>
    ? 0x8000 : 1u << 31;
template <class T> int exponent(T x) {
    return sizeof(T) == 8 ? std::bit_cast<Bits<T>>(x) >> (sizeof(T) == 8
        ? 52 : 0) & 2047 : std::bit_cast<Bits<T>>(x) >> 23 & 255;
}
template <class T> T quiet(T x) { return std::bit_cast<T>(std::bit_cast<Bits<T>>(x) | (SIGN<T> >> (sizeof(T) == 8
    ? 12 : 9))); }
template <class T> bool signalling(T x) { return x != x
    && std::bit_cast<Bits<T>>(quiet(x)) != std::bit_cast<Bits<T>>(x); }
// A signalling NaN gives its quieted self; a number wins over a quiet NaN; −0 < +0.
template <class T> T larger(T x, T y) {
    if (signalling(x) || signalling(y)) return quiet(signalling(x) ? x : y);
    if (x != x || y != y) return x != x ? y : x;
    return x == y ? (std::signbit(x) ? y : x) : x > y ? x : y;
}
template <class T> T smaller(T x, T y) {
    if (signalling(x) || signalling(y)) return quiet(signalling(x) ? x : y);
    if (x != x || y != y) return x != x ? y : x;
    return x == y ? (std::signbit(x) ? x : y) : x < y ? x : y;
}
template <class T> T middle(T x, T y, T z) { return std::max(std::min(x, y), std::min(std::max(x, y), z)); }
static f32 middle_float(f32 x, f32 y, f32 z) {
    return x != x || y != y || z != z ? smaller(smaller(x, y), z) : middle(x, y, z);
}
template <class T> T clamped(f64 x) {
    if (x != x) return 0;
    return x >= f64(std::numeric_limits<T>::max()) ? std::numeric_limits<T>::max()
           : x <= f64(std::numeric_limits<T>::min()) ? std::numeric_limits<T>::min() : T(x);
}
template <class T> bool subnormal(T x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); }
static f32 flushed(f32 x) { return subnormal(x) ? std::copysign(0.f, x) : x; }
// The machine's exponentials are within an ulp: exact here, or with a hash of the operand an ulp beside it.
static bool ulps = false;
static f32 inexact(f32 x, f32 result) {
    if (!ulps || !std::isfinite(result) || result == 0) return result;
    u32 h = to_u32(x) * 2654435761u;
    h = (h ^ h >> 15) * 0x85ebca6bu;
    f32 moved = to_f32(to_u32(result) + int((h ^ h >> 13) % 3) - 1);
    return subnormal(moved) || !std::isfinite(moved) ? result : moved;
}
// What the machine's reciprocals of float64 keep: about 24 digits.
static f64 short_f64(f64 x) { return std::isfinite(x)
    ? std::bit_cast<f64>(std::bit_cast<u64>(x) & ~((1ull << 28) - 1)) : x; }
template <class T> u32 class_of(T x) {
    constexpr u64 QUIET = sizeof(T) == 8 ? 51 : 22;
    if (x != x) return std::bit_cast<Bits<T>>(x) >> QUIET & 1 ? 2 : 1;
    u32 step = std::isinf(x) ? 0 : x == 0 ? 3 : subnormal(x) ? 2 : 1;
    return std::signbit(x) ? 4u << step : 512u >> step;
}
template <class T> T reversed(T x) {
    T out = 0;
    for (unsigned k = 0; k < 8 * sizeof(T); k++) out |= (x >> k & 1) << (8 * sizeof(T) - 1 - k);
    return out;
}
template <class T> T field(T x, u32 offset, u32 width) {  // extends the sign of signed types
    constexpr u32 ALL = 8 * sizeof(T);
    if (width == 0) return 0;
    width = std::min(width, ALL - offset);
    return T(std::make_unsigned_t<T>(x) << (ALL - width - offset)) >> (ALL - width);
}
static u32 permuted(u32 high, u32 low, u32 choice) {
    u64 from = u64(high) << 32 | low;
    u32 out = 0;
    for (int k = 0; k < 4; k++) {
        u32 c = choice >> 8 * k & 255;
        u32 byte = c >= 13 ? 255 : c == 12 ? 0 : c >= 8 ? (from >> (16 * (c - 8) + 15) & 1
            ? 255 : 0) : from >> 8 * c & 255;
        out |= byte << 8 * k;
    }
    return out;
}

// Operands

// The lane that a DPP control reads for lane l, and whether there is one.
static bool dpp_lane(const Instruction& i, int l, int& from) {
    int row = l & ~15, in = l & 15, n = i.dpp_lanes[0];
    switch (i.dpp_kind) {
        case 1: from = (l & ~3) + i.dpp_lanes[l & 3]; return true;   // quad_perm
        case 2: from = l + n; return in + n <= 15;                   // row_shl
        case 3: from = l - n; return in >= n;                        // row_shr
        case 4: from = row + ((in - n) & 15); return true;           // row_ror
        case 5: from = row + 15 - in; return true;                   // row_mirror
        case 6: from = row + ((in & 8) | (7 - (in & 7))); return true;  // row_half_mirror
        case 7: from = row - 1; return l >= 16;                      // row_bcast:15
        case 8: from = 31; return l >= 32;                           // row_bcast:31
        default: from = row + n; return true;                        // row_newbcast
    }
}
static u64 dpp_mask(Wave& w, const Instruction& i) {
    u64 mask = 0;
    EACH {
        int from;
        if (!(i.row_mask >> (l >> 4) & 1) || !(i.bank_mask >> (l >> 2 & 3) & 1)) continue;
        bool there = dpp_lane(i, l, from);
        if (there && !w.active(from) && w.active(l)) found(w, i, INACTIVE_LANE, l, from);
        if ((there && w.active(from)) || i.bound_ctrl) mask |= 1ull << l;
    }
    return mask;
}
static u32 part_of(u32 x, const Operand& o) {
    if (o.part < 4) return o.sign_extend ? u32(i32(i8(x >> 8 * o.part))) : x >> 8 * o.part & 255;
    u32 half = x >> 16 * (o.part - 4);
    return o.part == WHOLE ? x : o.sign_extend ? u32(i32(i16(half))) : half & 0xffff;
}
template <class T> T constant(const Operand& o) {
    if constexpr (sizeof(T) == 8) return std::bit_cast<T>(FLOAT<T> ? o.float64 : o.int64);
    else if constexpr (std::is_same_v<T, Half>) return Half{o.half};
    else if constexpr (sizeof(T) == 2) return T(o.bits);
    else return std::bit_cast<T>(o.bits);
}
// Source k in each lane, with its modifiers.
template <class T> const T* source(Wave& w, const Instruction& i, int k, T* out) {
    const Operand& o = i.source[k];
    if (o.place == VECTOR) {
        check_vector(w, i, o.index, sizeof(T) == 8 ? 2 : 1);
        const u32 *low = w.v[o.index], *high = w.v[o.index + 1];
        u32 moved[LANES];
        if (i.dpp && k == 0) {
            EACH {
                int from;
                bool there = dpp_lane(i, l, from);
                moved[l] = there && w.active(from) ? low[from] : 0;
            }
            low = moved;
        } else if (i.sdwa && o.part != WHOLE) {
            EACH moved[l] = part_of(low[l], o);
            low = moved;
        }
        if constexpr (sizeof(T) == 8) EACH out[l] = std::bit_cast<T>(low[l] | u64(high[l]) << 32);
        else if constexpr (sizeof(T) == 2) EACH out[l] = T(low[l]);
        else std::memcpy((void*)out, low, sizeof moved);
    } else {
        T x = constant<T>(o);
        if (o.place == SCALAR) {
            if constexpr (sizeof(T) == 8) x = std::bit_cast<T>(scalar_pair(w, i, o.index));
            else {
                u32 bits = scalar_register(w, i, o.index);
                if (i.sdwa) bits = part_of(bits, o);
                if constexpr (sizeof(T) == 2) x = T(bits);
                else x = std::bit_cast<T>(bits);
            }
        }
        EACH out[l] = x;
    }
    if constexpr (FLOAT<T>)
        if (o.negate | o.absolute) {
            Bits<T> kept = o.absolute ? ~SIGN<T> : ~Bits<T>(0), flipped = o.negate ? SIGN<T> : 0;
            EACH out[l] = std::bit_cast<T>((std::bit_cast<Bits<T>>(out[l]) & kept) ^ flipped);
        }
    return out;
}
static void write_words(Wave& w, const Instruction& i, const u32* x) {
    u64 mask = w.exec() & (i.dpp ? dpp_mask(w, i) : ~0ull);
    u32 placed[LANES];
    if (i.sdwa && i.out_part != WHOLE) {
        bool byte = i.out_part < 4;
        u32 ones = byte ? 0xff : 0xffff, shift = byte ? 8 * i.out_part : 16 * (i.out_part - 4);
        EACH {
            u32 rest = i.out_rest == 2 ? w.v[i.out.index][l] & ~(ones << shift) : 0;
            bool negative = i.out_rest == 1 && x[l] & (ones + 1) >> 1;
            placed[l] = (x[l] & ones) << shift | (negative ? u32(~u64(0) << (shift + (byte ? 8 : 16))) : rest);
        }
        x = placed;
    }
    write_lanes(w, i.out.index, x, mask);
}
template <class T> void write(Wave& w, const Instruction& i, T* x) {
    if constexpr (std::is_floating_point_v<T>)
        if (i.omod | i.clamp) EACH {
            x[l] *= i.omod == 1 ? T(2) : i.omod == 2 ? T(4) : i.omod == 3 ? T(0.5) : T(1);
            if (i.clamp) x[l] = x[l] > 0 ? std::min(x[l], T(1)) : T(0);
        }
    u32 low[LANES], high[LANES];
    if constexpr (sizeof(T) == 8) {
        EACH low[l] = u32(std::bit_cast<u64>(x[l])), high[l] = u32(std::bit_cast<u64>(x[l]) >> 32);
        write_lanes(w, i.out.index, low, w.exec()), write_lanes(w, i.out.index + 1, high, w.exec());
    } else if constexpr (sizeof(T) == 4) {
        std::memcpy(low, x, sizeof low), write_words(w, i, low);
    } else {
        EACH low[l] = std::make_unsigned_t<T>(x[l]);
        write_words(w, i, low);
    }
}
template <class T> T scalar_source(Wave& w, const Instruction& i, int k) {
    const Operand& o = i.source[k];
    if (o.place == VECTOR) found(w, i, UNSUPPORTED, 0, 1);
    if (o.place != SCALAR) return constant<T>(o);
    if constexpr (sizeof(T) == 8) return T(scalar_pair(w, i, o.index));
    else return T(scalar_register(w, i, o.index));
}
template <class T> void write_scalar(Wave& w, const Instruction& i, T x) {
    if (sizeof(T) == 8) w.set_pair(i.out.index, u64(x));
    else w.s[i.out.index] = u32(x), w.s_pending[i.out.index] = -1;
}

// Families of instructions. F is a function without state, so that its type is all that a template needs.

template <class T> using Row = std::array<T, LANES>;
template <class To, class... From, class F> void vector(const std::string& name, F) {  // a bool goes to a mask
    define(name, [](Wave& w, const Instruction& i) {
        std::tuple<Row<From>...> in;
        Row<To> out;
        int k = 0;
        std::apply([&](auto&... row) { (source(w, i, k++, row.data()), ...); }, in);
        EACH out[l] = To(std::apply([&](auto&... row) { return F{}(row[l]...); }, in));
        if constexpr (std::is_same_v<To, bool>) {
            u64 mask = 0;
            EACH mask |= u64(out[l]) << l;
            w.set_pair(i.out.index, mask & w.exec());
        } else {
            write(w, i, out.data());
        }
    });
}
template <class F> void carrying(const std::string& name, F) {  // F gives the sum, and what is beyond its 32 bits
    define(name, [](Wave& w, const Instruction& i) {
        u32 a[LANES], b[LANES], out[LANES];
        source(w, i, 0, a), source(w, i, 1, b);
        u64 in = i.source[2].place == SCALAR ? scalar_pair(w, i, i.source[2].index) : 0, carry = 0;
        EACH {
            u64 sum = F{}(u64(a[l]), u64(b[l]), in >> l & 1);
            out[l] = u32(sum), carry |= (sum >> 32 & 1) << l;
        }
        write(w, i, out), w.set_pair(i.carry.index, carry & w.exec());
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
template <class... From, class F> void logic(const std::string& name, F) {  // SCC: whether the result is not 0
    using T = std::tuple_element_t<0, std::tuple<From...>>;
    scalar<T, From...>(name, [](u32& scc, From... x) { T out = T(F{}(x...)); scc = out != 0; return out; });
}
template <class F> void save_exec(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        u64 before = w.exec(), after = F{}(scalar_source<u64>(w, i, 0), before);
        w.set_pair(i.out.index, before), w.set_pair(EXEC, after), w.scc = after != 0;
    });
}
template <class F> void jump(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) { if (F{}(w, i)) w.pc = i.target; });
}

// Division: a scaled quotient by Newton's iteration, and its end cases

template <class T> constexpr int SCALE = sizeof(T) == 8 ? 128 : 64;
template <class T> void div_scale(Wave& w, const Instruction& i) {
    using Wide = std::conditional_t<sizeof(T) == 8, long double, f64>;
    T s[LANES], d[LANES], n[LANES], out[LANES];
    source(w, i, 0, s), source(w, i, 1, d), source(w, i, 2, n);
    auto tiny = [](Wide x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); };
    u64 flags = 0;
    EACH {
        bool small_inverse = tiny(1 / Wide(d[l])), small_quotient = tiny(Wide(n[l]) / d[l]), flag = false;
        int shift = 0;
        if (exponent(n[l]) - exponent(d[l]) >= (sizeof(T) == 8 ? 768 : 96)) flag = true, shift = s[l] == d[l];
        else if (subnormal(d[l])) shift = 1;
        else if (small_inverse && small_quotient) flag = true, shift = -(s[l] == d[l]);  // the document's + overflows
        else if (small_inverse) shift = -1;
        else if (small_quotient) flag = true, shift = s[l] == n[l];
        else if (exponent(n[l]) <= (sizeof(T) == 8 ? 53 : 23)) shift = 1;
        bool undefined = n[l] == 0 || d[l] == 0;
        out[l] = undefined ? std::numeric_limits<T>::quiet_NaN() : std::ldexp(s[l], shift * SCALE<T>);
        flags |= u64(flag && !undefined) << l;
    }
    write(w, i, out), w.set_pair(i.carry.index, flags & w.exec());
}
template <class T> void div_fmas(Wave& w, const Instruction& i) {
    T a[LANES], b[LANES], c[LANES];
    source(w, i, 0, a), source(w, i, 1, b), source(w, i, 2, c);
    u64 flags = scalar_pair(w, i, VCC);
    EACH {
        T sum = std::fma(a[l], b[l], c[l]);
        if (flags >> l & 1) {
            if (exponent(c[l]) > (sizeof(T) == 8 ? 1023 : 127)) sum = std::ldexp(sum, SCALE<T>);
            else if (sizeof(T) == 8) sum = std::ldexp(sum, -SCALE<T>);
            else sum = T(std::ldexp(f64(a[l]) * f64(b[l]) + f64(c[l]), -SCALE<T>));  // rounded once
        }
        a[l] = sum;
    }
    write(w, i, a);
}
template <class T> T div_fixup(T q, T d, T n) {
    const T sign = std::signbit(d) != std::signbit(n) ? T(-1) : T(1), inf = std::numeric_limits<T>::infinity();
    if (n != n || d != d) return quiet(n != n ? n : d);
    if ((d == 0 && n == 0) || (std::isinf(d) && std::isinf(n))) return -std::numeric_limits<T>::quiet_NaN();
    if (d == 0 || std::isinf(n)) return sign * inf;
    bool vanishes = std::isinf(d) || n == 0 || exponent(n) - exponent(d) < (sizeof(T) == 8 ? -1075 : -150);
    return vanishes ? sign * T(0) : q != q ? sign * inf : std::copysign(q, sign);
}

// Memory operations

struct Access {
    int bytes;
    bool sign = false;
    int half = 0;  // 1, 2: the low or high half of a register; the other stays
};
template <Access A> constexpr int WORDS = (A.bytes + 3) / 4;
template <Access A> void put(Wave& w, int r, int lane, const u32* t) {
    if (A.bytes >= 4) for (int k = 0; k < WORDS<A>; k++) w.v[r + k][lane] = t[k];
    else {
        u32 x = field<u32>(t[0], 0, 8 * A.bytes), &out = w.v[r][lane];
        if (A.sign) x = u32(field<i32>(i32(x), 0, 8 * A.bytes));
        out = A.half == 1 ? (out & 0xffff0000) | x : A.half == 2 ? (out & 0xffff) | x << 16 : x;
    }
}
template <Access A> void take(Wave& w, int r, int lane, u32* t) {
    for (int k = 0; k < WORDS<A>; k++) t[k] = w.v[r + k][lane] >> (A.half == 2 ? 16 : 0);
}
static void under_way(Wave& w, int r, int words, i32 record) {
    for (int k = r; k < r + words; k++) w.v_pending[k] = record;
}
// Through a descriptor: what is beyond its size reads as 0, and is not written.
template <Access A, bool STORE> void buffer(Wave& w, const Instruction& i) {
    const Operand *o = i.source + STORE, &description = o[1];
    const u32* d = w.s + description.index;
    for (int k = 0; k < 4; k++) scalar_register(w, i, description.index + k);
    u64 base = (d[0] | u64(d[1]) << 32) & 0xFFFFFFFFFFFF;
    if (i.idxen || d[1] >> 31) found(w, i, UNSUPPORTED, 0, 2);
    u32 shift = scalar_source<u32>(w, i, STORE + 2);
    u64 size = d[2] > shift ? d[2] - shift : 0;
    const int step = std::min(A.bytes, 4), data = STORE ? i.source[0].index : i.out.index;
    if (i.offen) check_vector(w, i, o[0].index);
    if (STORE) check_vector(w, i, data, WORDS<A>);
    i32 record = new_record(w, false);
    EACH if (w.active(l)) {
        u32 t[4] = {};
        u64 offset = (i.offen ? w.v[o[0].index][l] : 0) + u64(u32(i.offset));
        bool whole = offset + A.bytes <= size;
        if (STORE) take<A>(w, data, l, t);
        for (int k = 0; k < A.bytes; k += whole ? A.bytes : step)
            if (int n = whole ? A.bytes : step; offset + k + n > size) continue;
            else if (STORE) store(w, i, base + shift + offset + k, n, t + k / 4, l, record);
            else load(w, i, base + shift + offset + k, n, t + k / 4, l, record);
        if (!STORE) put<A>(w, data, l, t);
    }
    if (!STORE) under_way(w, data, WORDS<A>, record);
}
template <Access A, bool STORE> void global(Wave& w, const Instruction& i) {
    const Operand &address = i.source[0], &base = i.source[STORE ? 2 : 1];
    const int data = STORE ? i.source[1].index : i.out.index;
    const bool relative = base.place == SCALAR;
    check_vector(w, i, address.index, relative ? 1 : 2);
    if (STORE) check_vector(w, i, data, WORDS<A>);
    u64 start = (relative ? scalar_pair(w, i, base.index) : 0) + i64(i.offset);
    i32 record = new_record(w, false);
    EACH if (w.active(l)) {
        u32 t[4] = {};
        u64 a = start + w.v[address.index][l] + (relative ? 0 : u64(w.v[address.index + 1][l]) << 32);
        if (STORE) take<A>(w, data, l, t), store(w, i, a, A.bytes, t, l, record);
        else load(w, i, a, A.bytes, t, l, record), put<A>(w, data, l, t);
    }
    if (!STORE) under_way(w, data, WORDS<A>, record);
}
template <int WORDS> void scalar_load(Wave& w, const Instruction& i) {
    u64 a = (scalar_source<u64>(w, i, 0) & ~3ull) + i64(i.offset);
    a += i.source[1].place == SCALAR ? u64(scalar_register(w, i, i.source[1].index)) : u64(i64(i32(i.source[1].bits)));
    i32 record = new_record(w, true);
    u32 t[WORDS];
    w.scalar_loads = true;
    load(w, i, a, sizeof t, t, -1, record);
    for (int k = 0; k < WORDS; k++) w.s[i.out.index + k] = t[k], w.s_pending[i.out.index + k] = record;
}
// One or two (PAIR) values of LDS; offsets of two count values, or 64 of them (FAR).
template <Access A, bool STORE, bool PAIR = false, bool FAR = false> void lds(Wave& w, const Instruction& i) {
    const u32 unit = PAIR ? A.bytes * (FAR ? 64 : 1) : 1, align = PAIR ? A.bytes : std::min(A.bytes, 8);
    check_vector(w, i, i.source[0].index);
    for (int k = 1; STORE && k <= 1 + PAIR; k++) check_vector(w, i, i.source[k].index, WORDS<A>);
    i32 record = new_record(w, true);
    Row<u32> address;
    std::memcpy(address.data(), w.v[i.source[0].index], sizeof address);
    EACH if (w.active(l)) for (int k = 0; k <= PAIR; k++) {
        u32 t[4] = {}, a = address[l] + unit * (k ? i.offset1 : i.offset);
        if (STORE) take<A>(w, i.source[1 + k].index, l, t);
        lds_access(w, i, a, A.bytes, t, STORE, l, record, align);
        if (!STORE) put<A>(w, i.out.index + k * WORDS<A>, l, t);
    }
    if (!STORE) under_way(w, i.out.index, (1 + PAIR) * WORDS<A>, record);
}
static void exchange(Wave& w, const Instruction& i, int data, const Row<int>& from) {
    u32 x[LANES], out[LANES];
    source(w, i, data, x);
    EACH out[l] = w.active(from[l]) ? x[from[l]] : 0;
    i32 record = new_record(w, true);
    write(w, i, out), under_way(w, i.out.index, 1, record);
}

// Matrix products: D = A B + C, in the order of k with one rounding each (the hardware's order is not documented)

enum Entry { FLOAT32, FLOAT16, BFLOAT16, XFLOAT32 };
template <int M, Entry TYPE, int PER_LANE> void mfma(Wave& w, const Instruction& i) {
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
        return TYPE == FLOAT16 ? from_half(half) : to_f32(TYPE == BFLOAT16 ? half << 16 : x);
    };
    for (int k = 0; k < 3; k++)
        if (i.source[k].place == VECTOR) check_vector(w, i, i.source[k].index, k == 2 ? OUT : NARROW
            ? PER_LANE / 2 : PER_LANE);
    EACH for (int e = 0; e < PER_LANE; e++) {
        int k = l / M * PER_LANE + e;
        a[k][l % M] = entry(0, e, l), b[k][l % M] = entry(1, e, l);
    }
    auto row = [](int r, int l) { return r / 4 * (4 * GROUPS) + 4 * (l / M) + r % 4; };
    EACH for (int r = 0; r < OUT; r++) c[row(r, l)][l % M] = to_f32(word(2, r, l));
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < M; n++) c[m][n] = std::fma(a[k][m], b[k][n], c[m][n]);
    EACH for (int r = 0; r < OUT; r++) w.v[i.out.index + r][l] = to_u32(c[row(r, l)][l % M]);
    under_way(w, i.out.index, OUT, -1);
}

// Word `second` of source k, without modifiers.
static void word(Wave& w, const Instruction& i, int k, int second, u32* out) {
    const Operand& o = i.source[k];
    const int r = o.index + second;
    if (o.place == VECTOR) check_vector(w, i, r), std::memcpy(out, w.v[r], sizeof w.v[r]);
    else std::fill_n(out, LANES, o.place == SCALAR ? scalar_register(w, i, r) : o.bits);
}
// Two float32 in a register pair; op_sel and op_sel_hi choose the halves for the low and the high result.
template <class F> void packed(const std::string& name, F) {
    define(name, [](Wave& w, const Instruction& i) {
        f32 in[3][LANES];
        u32 out[2][LANES];
        for (int half = 0; half < 2; half++) {
            for (int k = 0; k < 3 && i.source[k].place != NONE; k++) {
                const bool second = (half ? i.op_sel_hi : i.op_sel)[k];
                const u32 flipped = (half ? i.neg_hi : i.neg_lo)[k] ? SIGN<f32> : 0;
                u32 x[LANES];
                if (i.source[k].place == CONSTANT && second) found(w, i, HIGH_CONSTANT, k, 0);
                word(w, i, k, second, x);
                EACH in[k][l] = to_f32(x[l] ^ flipped);
            }
            EACH out[half][l] = to_u32(F{}(in[0][l], in[1][l], in[2][l]));
        }
        if (i.clamp) found(w, i, UNSUPPORTED, 0, 3);
        write_lanes(w, i.out.index, out[0], w.exec()), write_lanes(w, i.out.index + 1, out[1], w.exec());
    });
}
// a · b + c of float32 and float16 operands: op_sel_hi says which are float16, op_sel which half; neg_hi is |x| here.
static Row<f64> mixed(Wave& w, const Instruction& i) {
    Row<f64> in[3];
    for (int k = 0; k < 3; k++) {
        const Operand& o = i.source[k];
        u32 x[LANES];
        source(w, i, k, x);
        const bool half = i.op_sel_hi[k], vector = o.place == VECTOR;
        EACH {
            u32 bits = half && o.place == CONSTANT ? o.half : half && vector && i.op_sel[k] ? x[l] >> 16 : x[l];
            f32 value = half ? from_half(bits & 0xffff) : to_f32(bits);
            if (i.neg_hi[k] | o.absolute) value = std::fabs(value);
            in[k][l] = i.neg_lo[k] | o.negate ? -value : value;
        }
    }
    EACH in[0][l] = std::fma(in[0][l], in[1][l], in[2][l]);
    return in[0];
}

// The instructions, by name. x, y, z are the sources; a scalar one may also set scc.

#define S1(T, A, name, e) scalar<T, A>(name, [](u32& scc, A x) { return (void)scc, e; });
#define S2(T, A, B, name, e) scalar<T, A, B>(name, [](u32& scc, A x, B y) { return (void)scc, e; });
#define LOGIC(A, B, name, e) logic<A, B>(name, [](A x, B y) { return e; });
#define TEST(A, B, name, e) scalar<void, A, B>(name, [](u32&, A x, B y) { return e; });
#define V1(T, A, name, e) vector<T, A>(name, [](A x) { return e; });
#define V2(T, A, B, name, e) vector<T, A, B>(name, [](A x, B y) { return e; });
#define V3(T, A, B, C, name, e) vector<T, A, B, C>(name, [](A x, B y, C z) { return e; });
#define I1(name, e) V1(u32, u32, name, e)
#define I2(name, e) V2(u32, u32, u32, name, e)
#define I3(name, e) V3(u32, u32, u32, u32, name, e)

template <class T> void define_bitwise(const std::string& type) {
    constexpr u32 LAST = 8 * sizeof(T) - 1;
    using Signed = std::make_signed_t<T>;
    LOGIC(T, T, "s_and_b" + type, x & y) LOGIC(T, T, "s_or_b" + type, x | y) LOGIC(T, T, "s_xor_b" + type, x ^ y)
    LOGIC(T, T, "s_andn2_b" + type, x & ~y) LOGIC(T, T, "s_orn2_b" + type, x | ~y)
    LOGIC(T, T, "s_nand_b" + type, ~(x & y)) LOGIC(T, T, "s_nor_b" + type, ~(x | y))
    LOGIC(T, T, "s_xnor_b" + type, ~(x ^ y))
    LOGIC(T, u32, "s_lshl_b" + type, x << (y & LAST)) LOGIC(T, u32, "s_lshr_b" + type, x >> (y & LAST))
    LOGIC(Signed, u32, "s_ashr_i" + type, x >> (y & LAST))
    LOGIC(T, u32, "s_bfe_u" + type, field(x, y & LAST, y >> 16 & 127))
    LOGIC(Signed, u32, "s_bfe_i" + type, field(x, y & LAST, y >> 16 & 127))
    logic<T>("s_not_b" + type, [](T x) { return ~x; });
    S1(T, T, "s_mov_b" + type, x) S1(T, T, "s_brev_b" + type, reversed(x))
    S2(T, T, T, "s_cselect_b" + type, scc ? x : y)
    S1(u32, T, "s_ff1_i32_b" + type, x ? std::countr_zero(x) : -1)
    S1(u32, T, "s_flbit_i32_b" + type, x ? std::countl_zero(x) : -1)
    S1(u32, T, "s_bcnt1_i32_b" + type, (scc = x != 0, std::popcount(x)))
    TEST(T, u32, "s_bitcmp0_b" + type, !(x >> (y & LAST) & 1)) TEST(T, u32, "s_bitcmp1_b" + type, x >> (y & LAST) & 1)
}
template <class T> void define_ordered(const std::string& type) {
    using K = std::conditional_t<std::is_signed_v<T>, i16, u16>;
    S2(T, T, T, "s_min_" + type, (scc = x < y, std::min(x, y)))
    S2(T, T, T, "s_max_" + type, (scc = x > y, std::max(x, y)))
    TEST(T, T, "s_cmp_eq_" + type, x == y) TEST(T, T, "s_cmp_lg_" + type, x != y) TEST(T, T, "s_cmp_gt_" + type, x > y)
    TEST(T, T, "s_cmp_ge_" + type, x >= y) TEST(T, T, "s_cmp_lt_" + type, x < y) TEST(T, T, "s_cmp_le_" + type, x <= y)
    TEST(T, K, "s_cmpk_eq_" + type, x == T(y)) TEST(T, K, "s_cmpk_lg_" + type, x != T(y))
    TEST(T, K, "s_cmpk_gt_" + type, x > T(y)) TEST(T, K, "s_cmpk_ge_" + type, x >= T(y))
    TEST(T, K, "s_cmpk_lt_" + type, x < T(y)) TEST(T, K, "s_cmpk_le_" + type, x <= T(y))
    V2(T, T, T, "v_min_" + type, std::min(x, y)) V2(T, T, T, "v_max_" + type, std::max(x, y))
    V3(T, T, T, T, "v_min3_" + type, std::min(std::min(x, y), z)) V3(T, T, T, T, "v_med3_" + type, middle(x, y, z))
    V3(T, T, T, T, "v_max3_" + type, std::max(std::max(x, y), z))
}
static void define_scalar() {
    define_bitwise<u32>("32"), define_bitwise<u64>("64"), define_ordered<i32>("i32"), define_ordered<u32>("u32");
    S2(u32, u32, u32, "s_add_i32", (scc = (~(x ^ y) & (x ^ (x + y))) >> 31, x + y))
    S2(u32, u32, u32, "s_sub_i32", (scc = ((x ^ y) & (x ^ (x - y))) >> 31, x - y))
    S2(u32, u32, u32, "s_add_u32", (scc = x + y < x, x + y)) S2(u32, u32, u32, "s_sub_u32", (scc = x < y, x - y))
    scalar<u32, u32, u32>("s_addc_u32", [](u32& scc, u64 x, u32 y) { return x += scc + u64(y), scc = x >> 32, x; });
    scalar<u32, u32, u32>("s_subb_u32", [](u32& scc, u64 x, u32 y) { return x -= scc + u64(y), scc = x >> 63, x; });
    S2(u32, u32, u32, "s_mul_i32", x * y) S2(u32, u32, u32, "s_mul_hi_u32", u64(x) * y >> 32)
    S2(u32, i32, i32, "s_mul_hi_i32", i64(x) * y >> 32)
    LOGIC(u32, u32, "s_absdiff_i32", i32(x) > i32(y) ? x - y : y - x)
    S2(u32, u32, u32, "s_bfm_b32", ((1u << (x & 31)) - 1) << (y & 31))
    logic<u32>("s_abs_i32", [](u32 x) { return i32(x) < 0 ? -x : x; });
    S1(u32, u32, "s_sext_i32_i8", i8(x)) S1(u32, u32, "s_sext_i32_i16", i16(x)) S1(u32, i16, "s_movk_i32", x)
    TEST(u64, u64, "s_cmp_eq_u64", x == y) TEST(u64, u64, "s_cmp_lg_u64", x != y)
    S2(u32, u32, u32, "s_lshl1_add_u32", (scc = ((u64(x) << 1) + y) >> 32 != 0, (x << 1) + y))
    S2(u32, u32, u32, "s_lshl2_add_u32", (scc = ((u64(x) << 2) + y) >> 32 != 0, (x << 2) + y))
    S2(u32, u32, u32, "s_lshl3_add_u32", (scc = ((u64(x) << 3) + y) >> 32 != 0, (x << 3) + y))
    S2(u32, u32, u32, "s_lshl4_add_u32", (scc = ((u64(x) << 4) + y) >> 32 != 0, (x << 4) + y))
    S2(u32, u32, u32, "s_pack_ll_b32_b16", (x & 0xffff) | y << 16)
    S2(u32, u32, u32, "s_pack_lh_b32_b16", (x & 0xffff) | (y & 0xffff0000))
    S2(u32, u32, u32, "s_pack_hh_b32_b16", x >> 16 | (y & 0xffff0000))
    // These two also read what they write; the constant is the first source.
    define("s_addk_i32", [](Wave& w, const Instruction& i) {
        u32 x = scalar_register(w, i, i.out.index), y = u32(constant<i16>(i.source[0])), r = x + y;
        write_scalar(w, i, r), w.scc = (~(x ^ y) & (x ^ r)) >> 31;
    });
    define("s_mulk_i32", [](Wave& w, const Instruction& i) {
        write_scalar(w, i, scalar_register(w, i, i.out.index) * u32(constant<i16>(i.source[0])));
    });
    save_exec("s_and_saveexec_b64", [](u64 x, u64 exec) { return x & exec; });
    save_exec("s_or_saveexec_b64", [](u64 x, u64 exec) { return x | exec; });
    save_exec("s_xor_saveexec_b64", [](u64 x, u64 exec) { return x ^ exec; });
    save_exec("s_andn2_saveexec_b64", [](u64 x, u64 exec) { return x & ~exec; });
    for (auto name : {"s_nop", "s_sleep", "s_setprio", "buffer_inv", "buffer_wbl2", "s_code_end"})
        define(name, [](Wave&, const Instruction&) {});
    define("s_waitcnt", [](Wave& w, const Instruction& i) {
        if (i.vmcnt >= 0) retire(w, w.vm, i.vmcnt);
        // Scalar loads return in any order: with one under way, only a count of 0 tells anything.
        if (i.lgkmcnt == 0 || (i.lgkmcnt > 0 && !w.scalar_loads)) retire(w, w.lgkm, i.lgkmcnt);
        w.scalar_loads &= i.lgkmcnt != 0;
    });
    define("s_barrier", [](Wave& w, const Instruction& i) { w.waiting = true,
        w.barrier = i32(&i - w.machine->launch.code); });
    define("s_endpgm", [](Wave& w, const Instruction&) { w.done = true; });
    jump("s_branch", [](Wave&, const Instruction&) { return true; });
    jump("s_cbranch_scc0", [](Wave& w, const Instruction&) { return !w.scc; });
    jump("s_cbranch_scc1", [](Wave& w, const Instruction&) { return w.scc != 0; });
    jump("s_cbranch_vccz", [](Wave& w, const Instruction& i) { return !scalar_pair(w, i, VCC); });
    jump("s_cbranch_vccnz", [](Wave& w, const Instruction& i) { return scalar_pair(w, i, VCC) != 0; });
    jump("s_cbranch_execz", [](Wave& w, const Instruction&) { return !w.exec(); });
    jump("s_cbranch_execnz", [](Wave& w, const Instruction&) { return w.exec() != 0; });
}
static void define_integer() {
    define_ordered<i16>("i16"), define_ordered<u16>("u16");
    I1("v_mov_b32", x) I1("v_accvgpr_read_b32", x) I1("v_accvgpr_write_b32", x) V1(u64, u64, "v_mov_b64", x)
    I1("v_not_b32", ~x) I1("v_bfrev_b32", reversed(x))
    I1("v_ffbh_u32", x ? std::countl_zero(x) : -1) I1("v_ffbl_b32", x ? std::countr_zero(x) : -1)
    I2("v_add_u32", x + y) I2("v_sub_u32", x - y) I2("v_subrev_u32", y - x) I2("v_mul_lo_u32", x * y)
    I2("v_mul_hi_u32", u64(x) * y >> 32) V2(u32, i32, i32, "v_mul_hi_i32", i64(x) * y >> 32)
    I2("v_mul_u32_u24", (x & 0xffffff) * (y & 0xffffff))
    V2(u32, i32, i32, "v_mul_i32_i24", u32(field(x, 0, 24)) * field(y, 0, 24))
    I2("v_and_b32", x & y) I2("v_or_b32", x | y) I2("v_xor_b32", x ^ y) I2("v_xnor_b32", ~(x ^ y))
    I2("v_lshlrev_b32", y << (x & 31)) I2("v_lshrrev_b32", y >> (x & 31))
    V2(u32, u32, i32, "v_ashrrev_i32", y >> (x & 31)) V2(u64, u32, i64, "v_ashrrev_i64", y >> (x & 63))
    V2(u64, u32, u64, "v_lshlrev_b64", y << (x & 63)) V2(u64, u32, u64, "v_lshrrev_b64", y >> (x & 63))
    V2(u16, u16, u16, "v_add_u16", x + y) V2(u16, u16, u16, "v_sub_u16", x - y)
    V2(u16, u16, u16, "v_mul_lo_u16", u32(x) * y)
    V2(u16, u16, u16, "v_lshlrev_b16", y << (x & 15)) V2(u16, u16, u16, "v_lshrrev_b16", y >> (x & 15))
    I2("v_bfm_b32", ((1u << (x & 31)) - 1) << (y & 31)) I2("v_bcnt_u32_b32", std::popcount(x) + y)
    I3("v_add3_u32", x + y + z) I3("v_add_lshl_u32", (x + y) << (z & 31)) I3("v_lshl_add_u32", (x << (y & 31)) + z)
    V3(u64, u64, u32, u64, "v_lshl_add_u64", (x << (y & 7)) + z) I3("v_lshl_or_b32", x << (y & 31) | z)
    I3("v_and_or_b32", (x & y) | z) I3("v_or3_b32", x | y | z) I3("v_xad_u32", (x ^ y) + z)
    I3("v_mad_u32_u24", (x & 0xffffff) * (y & 0xffffff) + z) I3("v_bfi_b32", (x & y) | (~x & z))
    I3("v_bfe_u32", field(x, y & 31, z & 31)) V3(u32, i32, u32, u32, "v_bfe_i32", field(x, y & 31, z & 31))
    I3("v_alignbit_b32", (u64(x) << 32 | y) >> (z & 31)) I3("v_alignbyte_b32", (u64(x) << 32 | y) >> 8 * (z & 3))
    I3("v_perm_b32", permuted(x, y, z))
    carrying("v_add_co_u32", [](u64 x, u64 y, u64) { return x + y; });
    carrying("v_sub_co_u32", [](u64 x, u64 y, u64) { return x - y; });
    carrying("v_subrev_co_u32", [](u64 x, u64 y, u64) { return y - x; });
    carrying("v_addc_co_u32", [](u64 x, u64 y, u64 c) { return x + y + c; });
    carrying("v_subb_co_u32", [](u64 x, u64 y, u64 c) { return x - y - c; });
    carrying("v_subbrev_co_u32", [](u64 x, u64 y, u64 c) { return y - x - c; });
    V3(u64, u32, u32, u64, "v_mad_u64_u32", u64(x) * y + z) V3(u64, i32, i32, u64, "v_mad_i64_i32", i64(x) * y + z)
    define("v_pk_mov_b32", [](Wave& w, const Instruction& i) {
        u32 out[2][LANES];
        for (int k = 0; k < 2; k++) word(w, i, k, i.op_sel[k], out[k]);
        write_lanes(w, i.out.index, out[0], w.exec()), write_lanes(w, i.out.index + 1, out[1], w.exec());
    });
    define("v_pack_b32_f16", [](Wave& w, const Instruction& i) {
        Half a[LANES], b[LANES];
        u32 out[LANES];
        source(w, i, 0, a), source(w, i, 1, b);
        auto half = [&](const Half& x, int k) { return (i.op_sel[k] ? x.bits >> 16 : x.bits) & 0xffff; };
        EACH out[l] = half(a[l], 0) | half(b[l], 1) << 16;
        write(w, i, out);
    });
    define("v_cndmask_b32", [](Wave& w, const Instruction& i) {
        f32 a[LANES], b[LANES];  // with the modifiers of floats
        u32 out[LANES];
        source(w, i, 0, a), source(w, i, 1, b);
        u64 mask = scalar_source<u64>(w, i, 2);
        EACH out[l] = to_u32(mask >> l & 1 ? b[l] : a[l]);
        write(w, i, out);
    });
    define("v_readfirstlane_b32", [](Wave& w, const Instruction& i) {
        u32 x[LANES];
        write_scalar(w, i, source(w, i, 0, x)[w.exec() ? std::countr_zero(w.exec()) : 0]);
    });
    define("v_readlane_b32", [](Wave& w, const Instruction& i) {
        u32 x[LANES];
        write_scalar(w, i, source(w, i, 0, x)[scalar_source<u32>(w, i, 1) & 63]);
    });
    define("v_writelane_b32", [](Wave& w, const Instruction& i) {
        w.v[i.out.index][scalar_source<u32>(w, i, 1) & 63] = scalar_source<u32>(w, i, 0);
        w.v_pending[i.out.index] = -1;
    });
}

#define COMPARE(T, relation, type, e) V2(bool, T, T, std::string("v_cmp_" relation "_") + type, e)
template <class T> void define_comparisons(const char* type) {
    COMPARE(T, "lt", type, x < y) COMPARE(T, "le", type, x <= y) COMPARE(T, "eq", type, x == y)
    COMPARE(T, "gt", type, x > y) COMPARE(T, "ge", type, x >= y) COMPARE(T, "ne", type, x != y)
    if constexpr (FLOAT<T>) {
        COMPARE(T, "nlt", type, !(x < y)) COMPARE(T, "nle", type, !(x <= y)) COMPARE(T, "neq", type, !(x == y))
        COMPARE(T, "ngt", type, !(x > y)) COMPARE(T, "nge", type, !(x >= y)) COMPARE(T, "lg", type, x < y || x > y)
        COMPARE(T, "nlg", type, !(x < y || x > y)) COMPARE(T, "o", type, x == x && y == y)
        COMPARE(T, "u", type, x != x || y != y)
    }
}
template <class T> void define_floats(const std::string& type) {
    V2(T, T, T, "v_add_" + type, x + y) V2(T, T, T, "v_mul_" + type, x * y)
    V3(T, T, T, T, "v_fma_" + type, std::fma(x, y, z))
    V2(T, T, T, "v_max_" + type, larger(x, y)) V2(T, T, T, "v_min_" + type, smaller(x, y))
    V1(T, T, "v_rndne_" + type, std::nearbyint(x)) V1(T, T, "v_floor_" + type, std::floor(x))
    V1(T, T, "v_ceil_" + type, std::ceil(x)) V1(T, T, "v_trunc_" + type, std::trunc(x))
    V1(T, T, "v_fract_" + type, x - std::floor(x))
    V2(T, T, i32, "v_ldexp_" + type, std::ldexp(x, std::clamp(y, -5000, 5000)))
    vector<T, T>("v_frexp_mant_" + type, [](T x) { int e; return std::isfinite(x) ? std::frexp(x, &e) : x; });
    vector<i32, T>("v_frexp_exp_i32_" + type, [](T x) { int e = 0; return std::isfinite(x)
        ? std::frexp(x, &e), e : 0; });
    V2(bool, T, u32, "v_cmp_class_" + type, class_of(x) & y) V3(T, T, T, T, "v_div_fixup_" + type, div_fixup(x, y, z))
    V1(i32, T, "v_cvt_i32_" + type, clamped<i32>(x)) V1(u32, T, "v_cvt_u32_" + type, clamped<u32>(x))
    V1(T, i32, "v_cvt_" + type + "_i32", x) V1(T, u32, "v_cvt_" + type + "_u32", x)
    define("v_div_scale_" + type, div_scale<T>), define("v_div_fmas_" + type, div_fmas<T>);
    define("v_fmac_" + type, [](Wave& w, const Instruction& i) {
        Instruction with = i;
        with.source[2] = i.out, with.source[2].place = VECTOR;
        T a[LANES], b[LANES], c[LANES];
        source(w, i, 0, a), source(w, i, 1, b), source(w, with, 2, c);
        EACH a[l] = std::fma(a[l], b[l], c[l]);
        write(w, i, a);
    });
}
static void define_float() {
    define_floats<f32>("f32"), define_floats<f64>("f64");
    define_comparisons<f32>("f32"), define_comparisons<f64>("f64"), define_comparisons<Half>("f16");
    define_comparisons<i16>("i16"), define_comparisons<u16>("u16"), define_comparisons<i32>("i32");
    define_comparisons<u32>("u32"), define_comparisons<i64>("i64"), define_comparisons<u64>("u64");
    V2(f32, f32, f32, "v_sub_f32", x - y) V2(f32, f32, f32, "v_subrev_f32", y - x)
    V2(f32, f32, f32, "v_mul_legacy_f32", x == 0 || y == 0 ? 0 : x * y)
    V3(f32, f32, f32, f32, "v_fmaak_f32", std::fma(x, y, z)) V3(f32, f32, f32, f32, "v_fmamk_f32", std::fma(x, y, z))
    V3(f32, f32, f32, f32, "v_max3_f32", larger(larger(x, y), z))
    V3(f32, f32, f32, f32, "v_med3_f32", middle_float(x, y, z))
    V3(f32, f32, f32, f32, "v_min3_f32", smaller(smaller(x, y), z))
    packed("v_pk_add_f32", [](f32 x, f32 y, f32) { return x + y; }),
    packed("v_pk_mul_f32", [](f32 x, f32 y, f32) { return x * y; });
    packed("v_pk_fma_f32", [](f32 x, f32 y, f32 z) { return std::fma(x, y, z); });
    // Subnormal operands and results of these are flushed to 0.
    V1(f32, f32, "v_exp_f32", flushed(inexact(x, f32(std::exp2(f64(flushed(x)))))))
    V1(f32, f32, "v_log_f32", inexact(x, f32(std::log2(f64(flushed(x))))))
    V1(f32, f32, "v_sqrt_f32", inexact(x, std::sqrt(x)))
    V1(f32, f32, "v_rcp_f32", flushed(inexact(x, f32(1 / f64(flushed(x))))))
    V1(f32, f32, "v_rsq_f32", inexact(x, f32(1 / std::sqrt(f64(flushed(x))))))
    // The division of integers relies on an ulp, which a rounded value and another ulp is not.
    V1(f32, f32, "v_rcp_iflag_f32", flushed(f32(1 / f64(flushed(x)))))
    V1(f64, f64, "v_rcp_f64", short_f64(1 / x)) V1(f64, f64, "v_rsq_f64", short_f64(1 / std::sqrt(x)))
    V1(f64, f64, "v_sqrt_f64", short_f64(std::sqrt(x)))
    V1(f32, u32, "v_cvt_f32_ubyte0", x & 255) V1(f32, u32, "v_cvt_f32_ubyte1", x >> 8 & 255)
    V1(f64, f32, "v_cvt_f64_f32", x) V1(f32, f64, "v_cvt_f32_f64", x) V1(u32, f32, "v_cvt_f16_f32", to_half(x))
    V1(f32, Half, "v_cvt_f32_f16", x)
    V2(u32, f32, f32, "v_cvt_pkrtz_f16_f32", to_half(x, true) | to_half(y, true) << 16)
    define("v_fma_mix_f32", [](Wave& w, const Instruction& i) {
        Row<f32> out;
        Row<f64> sum = mixed(w, i);
        EACH out[l] = f32(sum[l]);
        write(w, i, out.data());
    });
    define("v_fma_mixlo_f16", [](Wave& w, const Instruction& i) {
        Row<f64> sum = mixed(w, i);
        u32 out[LANES];
        EACH out[l] = (w.v[i.out.index][l] & 0xffff0000) | to_half(sum[l]);
        write(w, i, out);
    });
    define("v_fma_mixhi_f16", [](Wave& w, const Instruction& i) {
        Row<f64> sum = mixed(w, i);
        u32 out[LANES];
        EACH out[l] = (w.v[i.out.index][l] & 0xffff) | to_half(sum[l]) << 16;
        write(w, i, out);
    });
    define("v_mfma_f32_32x32x8_bf16", mfma<32, BFLOAT16, 4>), define("v_mfma_f32_16x16x16_bf16", mfma<16, BFLOAT16, 4>);
    define("v_mfma_f32_32x32x8_f16", mfma<32, FLOAT16, 4>), define("v_mfma_f32_16x16x16_f16", mfma<16, FLOAT16, 4>);
    define("v_mfma_f32_32x32x2_f32", mfma<32, FLOAT32, 1>), define("v_mfma_f32_16x16x4_f32", mfma<16, FLOAT32, 1>);
    define("v_mfma_f32_32x32x4_xf32", mfma<32, XFLOAT32, 2>), define("v_mfma_f32_16x16x8_xf32", mfma<16, XFLOAT32, 2>);
}
template <Access A, bool STORE> void define_access(const std::string& suffix) {
    define("buffer_" + suffix, buffer<A, STORE>), define("global_" + suffix, global<A, STORE>);
    define("flat_" + suffix, global<A, STORE>);
}
template <int BYTES> void define_words(const std::string& global, const std::string& lds_suffix) {
    define_access<Access{BYTES}, false>("load_" + global), define_access<Access{BYTES}, true>("store_" + global);
    define("ds_read_" + lds_suffix, lds<Access{BYTES}, false>),
    define("ds_write_" + lds_suffix, lds<Access{BYTES}, true>);
    if constexpr (BYTES <= 8) {
        define("ds_read2_" + lds_suffix, lds<Access{BYTES}, false, true>);
        define("ds_write2_" + lds_suffix, lds<Access{BYTES}, true, true>);
        define("ds_read2st64_" + lds_suffix, lds<Access{BYTES}, false, true, true>);
        define("ds_write2st64_" + lds_suffix, lds<Access{BYTES}, true, true, true>);
    }
}
static void define_memory() {
    define_words<4>("dword", "b32"), define_words<8>("dwordx2", "b64");
    define_words<12>("dwordx3", "b96"), define_words<16>("dwordx4", "b128");
    define_access<Access{1}, false>("load_ubyte"), define_access<Access{1, true}, false>("load_sbyte");
    define_access<Access{2}, false>("load_ushort"), define_access<Access{2, true}, false>("load_sshort");
    define_access<Access{2, false, 1}, false>("load_short_d16"),
    define_access<Access{2, false, 2}, false>("load_short_d16_hi");
    define_access<Access{1}, true>("store_byte"), define_access<Access{1, false, 2}, true>("store_byte_d16_hi");
    define_access<Access{2}, true>("store_short"), define_access<Access{2, false, 2}, true>("store_short_d16_hi");
    define("ds_read_u8", lds<Access{1}, false>), define("ds_read_i8", lds<Access{1, true}, false>);
    define("ds_read_u16", lds<Access{2}, false>), define("ds_read_i16", lds<Access{2, true}, false>);
    define("ds_read_u16_d16", lds<Access{2, false, 1}, false>),
    define("ds_read_u16_d16_hi", lds<Access{2, false, 2}, false>);
    define("ds_write_b8", lds<Access{1}, true>), define("ds_write_b8_d16_hi", lds<Access{1, false, 2}, true>);
    define("ds_write_b16", lds<Access{2}, true>), define("ds_write_b16_d16_hi", lds<Access{2, false, 2}, true>);
    define("s_load_dword", scalar_load<1>), define("s_load_dwordx2", scalar_load<2>),
    define("s_load_dwordx4", scalar_load<4>);
    define("s_load_dwordx8", scalar_load<8>), define("s_load_dwordx16", scalar_load<16>);
    define("ds_swizzle_b32", [](Wave& w, const Instruction& i) {
        Row<int> from;
        const int o = i.offset, all = o & 31, one = o >> 5 & 31, flip = o >> 10 & 31;
        EACH from[l] = o & 0x8000 ? (l & ~3) | (o >> 2 * (l & 3) & 3) : (l & 32) | (((l & 31 & all) | one) ^ flip);
        exchange(w, i, 0, from);
    });
    define("ds_bpermute_b32", [](Wave& w, const Instruction& i) {
        u32 address[LANES];
        Row<int> from;
        source(w, i, 0, address);
        EACH from[l] = (address[l] + i.offset) >> 2 & 63;
        exchange(w, i, 1, from);
    });
}

// A launch

static void start(Wave& w, const Launch& launch, u32 x, u32 y, u32 z) {
    w.pc = launch.entry, w.done = w.waiting = w.scalar_loads = false;
    w.epoch = 1, w.scc = 0, w.steps = 0;
    w.vm.clear(), w.lgkm.clear();
    std::fill_n(w.v_pending, 512, -1), std::fill_n(w.s_pending, 128, -1);
    std::fill_n(&w.v[0][0], 512 * LANES, POISON), std::fill_n(w.s, 128, POISON);
    std::copy_n(launch.user, launch.user_size, w.s);
    const u32 number[3] = {x, y, z};
    for (int k = 0, r = launch.user_size; k < 3; k++)
        if (launch.identity[k]) w.s[r++] = number[k];
    const int lanes = std::min<int>(LANES, launch.threads - LANES * w.number);
    w.set_pair(EXEC, lanes == LANES ? ~0ull : (1ull << lanes) - 1);
    EACH w.v[0][l] = LANES * w.number + l;
}
static void step(Wave& w) {
    const Launch& launch = w.machine->launch;
    const Instruction& i = launch.code[w.pc];
    launch.count[w.pc++]++;
    operations[i.operation].run(w, i);
    if (++w.steps > launch.most_steps) found(w, i, ENDLESS, 0, 0);
}
static void run_workgroup(Machine& m, std::vector<Wave*>& waves) {
    auto running = [&](const Wave* w) { return !w->done && !w->waiting && !m.failed; };
    for (size_t alive = waves.size(); alive && !m.failed;) {
        for (bool any = true; any;) {
            any = false;
            for (size_t k = 0; k < waves.size(); k++) {
                Wave& w = *waves[m.launch.order == 1 ? waves.size() - 1 - k : k];
                for (int once = m.launch.order == 2, k = 0; running(&w) && !(once && k); k++) step(w), any = true;
            }
        }
        const Wave* first = nullptr;
        alive = 0;
        for (Wave* w : waves) {
            if (w->done) continue;
            alive++;
            if (first && first->barrier != w->barrier) found(*w, m.launch.code[w->barrier], OTHER_BARRIER, 0, 0);
            first = first ? first : w, w->waiting = false, w->epoch++;
        }
        if (first && alive < waves.size()) found(*waves[0], m.launch.code[first->barrier], OTHER_BARRIER, 0, 0);
    }
}

extern "C" int operation_number(const char* name) {
    if (operations.empty()) define_scalar(), define_integer(), define_float(), define_memory();
    auto it = numbers.find(name);
    return it == numbers.end() ? -1 : it->second;
}
extern "C" int size_of(int what) { return what == 0 ? sizeof(Instruction) : what == 1
    ? sizeof(Launch) : sizeof(Finding); }
extern "C" int run(const Launch* given) {
    const Launch& launch = *given;
    std::fenv_t environment;
    std::fegetenv(&environment), std::fesetenv(FE_DFL_ENV);
    ulps = launch.inexact;
    Machine m{launch, {}, {}, {}, {}, {}, {}, {}};
    for (int k = 0; k < launch.regions_size; k++) m.regions.push_back({launch.regions[2 * k],
        launch.regions[2 * k + 1]});
    for (int k = 0; k < launch.shadowed_size; k++) {
        u64 low = launch.shadowed[2 * k], high = launch.shadowed[2 * k + 1];
        m.shadows.push_back({low, high, 1, std::vector<Cell>((high - low) / 2 + 2), RACE, NOT_WAITED});
    }
    std::vector<Wave*> waves;
    for (u32 k = 0; k < (launch.threads + LANES - 1) / LANES; k++) {
        waves.push_back(new Wave());
        waves[k]->number = k, waves[k]->machine = &m;
    }
    for (u32 z = 0; z < launch.grid[2]; z++) for (u32 y = 0; y < launch.grid[1]; y++)
        for (u32 x = 0; x < launch.grid[0]; x++) {
        m.records.clear(), m.lds.assign(launch.lds, 0), m.lds_written.assign(launch.lds, 0);
        for (u32 k = 0; k < launch.lds; k++) m.lds[k] = u8(POISON >> 8 * (k & 3));
        m.lds_shadow = {0, launch.lds, 0, std::vector<Cell>(launch.lds), LDS_RACE, LDS_NOT_WAITED};
        for (Wave* w : waves) start(*w, launch, x, y, z);
        if (!m.failed) run_workgroup(m, waves);
        m.workgroup++;
    }
    for (Wave* w : waves) delete w;
    std::fesetenv(&environment);
    return m.findings;
}
