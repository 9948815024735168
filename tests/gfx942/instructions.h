// The instructions, by name: those that kernels compile to, and few more; another one is refused by its name.
// After AMD's document of the instruction set; notes say where that is vague.
#pragma once
#include <utility>

#include "operands.h"

// x, y and z are the sources. S: of scalars, which may set scc; LOGIC: which set it where the result is not 0; TEST:
// which set nothing else. V: of vectors, C: with a carry c, T: of types that are all T; DO: all else.
#define S1(A, B, name, e) scalar<A, B>(name, [](u32& scc, B x) { return (void)scc, e; });
#define S2(A, B, C, name, e) scalar<A, B, C>(name, [](u32& scc, B x, C y) { return (void)scc, e; });
#define LOGIC1(A, name, e) scalar<A, A>(name, [](u32& scc, A x) { return x = A(e), scc = x != 0, x; });
#define LOGIC2(A, B, name, e) scalar<A, A, B>(name, [](u32& scc, A x, B y) { return x = A(e), scc = x != 0, x; });
#define TEST(A, B, name, e) scalar<void, A, B>(name, [](u32&, A x, B y) { return e; });
#define V1(A, B, name, e) vector<A, B>(name, [](B x) { return e; });
#define V2(A, B, C, name, e) vector<A, B, C>(name, [](B x, C y) { return e; });
#define V3(A, B, C, D, name, e) vector<A, B, C, D>(name, [](B x, C y, D z) { return e; });
#define C2(name, e) masked<u32, u32, u32>(name, [](bool& c, u64 x, u64 y) { return x = e, c = x >> 32 & 1, u32(x); });
#define DO(name, e)                                  \
    define(name, [](Wave& w, const Instruction& i) { \
        (void)w, (void)i;                            \
        e;                                           \
    });
#define SHIFT_ADD(n) S2(T, T, T, "s_lshl" #n "_add_u32", (scc = ((u64(x) << n) + y) >> 32 != 0, (x << n) + y))
#define T1(name, e) V1(T, T, name, e)
#define T2(name, e) V2(T, T, T, name, e)
#define T3(name, e) V3(T, T, T, T, name, e)

// A relation by its number, whose bits tell if it holds where x is less, equal, greater, and where one is NaN.
constexpr const char* RELATIONS[] = {"f", "lt",  "eq",  "le",  "gt",  "lg",  "ge",  "o",
                                     "u", "nge", "nlg", "ngt", "nle", "neq", "nlt", "tru"};
template <int NUMBER> struct Relation {
    template <class T> bool operator()(T x, T y) const {
        return NUMBER >> (x < y ? 0 : x == y ? 1 : x > y ? 2 : 3) & 1;
    }
    template <class T, class K> bool operator()(u32&, T x, K y) const { return (*this)(x, T(y)); }
};
template <class T, int... N> void define_relations(const std::string& type, std::integer_sequence<int, N...>) {
    using K = std::conditional_t<std::is_signed_v<T>, i16, u16>;
    (vector<bool, T, T>(std::string("v_cmp_") + RELATIONS[N] + "_" + type, Relation<N>()), ...);
    if constexpr (!FLOAT<T>) {
        (scalar<void, T, T>(std::string("s_cmp_") + RELATIONS[N] + "_" + type, Relation<N>()), ...);
        (scalar<void, T, K>(std::string("s_cmpk_") + RELATIONS[N] + "_" + type, Relation<N>()), ...);
    }
}

// clang-format off: tables
template <class T> void define_bitwise(const std::string& type) {
    using Signed = std::make_signed_t<T>;
    constexpr u32 LAST = 8 * sizeof(T) - 1;
    S1(T, T, "s_mov_b" + type, x)                       LOGIC1(T, "s_not_b" + type, ~x)
    LOGIC2(T, T, "s_and_b" + type, x & y)               LOGIC2(T, T, "s_andn2_b" + type, x & ~y)
    LOGIC2(T, T, "s_or_b" + type, x | y)                LOGIC2(T, T, "s_xor_b" + type, x ^ y)
    LOGIC2(T, T, "s_nor_b" + type, ~(x | y))            LOGIC2(T, T, "s_nand_b" + type, ~(x & y))
    LOGIC2(T, T, "s_orn2_b" + type, x | ~y)             LOGIC2(T, T, "s_xnor_b" + type, ~(x ^ y))
    LOGIC2(T, u32, "s_lshl_b" + type, x << (y & LAST))  LOGIC2(T, u32, "s_lshr_b" + type, x >> (y & LAST))
    LOGIC2(Signed, u32, "s_ashr_i" + type, x >> (y & LAST))
    LOGIC2(Signed, u32, "s_bfe_i" + type, field(x, y & LAST, y >> 16 & 127))
    LOGIC2(T, u32, "s_bfe_u" + type, field(x, y & LAST, y >> 16 & 127))
    S2(T, T, T, "s_cselect_b" + type, scc ? x : y)
    TEST(T, u32, "s_bitcmp0_b" + type, !(x >> (y & LAST) & 1)) TEST(T, u32, "s_bitcmp1_b" + type, x >> (y & LAST) & 1)
}
template <class T> void define_ordered(const std::string& type) {
    S2(T, T, T, "s_min_" + type, (scc = x < y, std::min(x, y)))     T2("v_min_" + type, std::min(x, y))
    S2(T, T, T, "s_max_" + type, (scc = x > y, std::max(x, y)))     T2("v_max_" + type, std::max(x, y))
}
inline void define_scalar() {
    using T = u32;
    define_bitwise<u32>("32"), define_bitwise<u64>("64"), define_ordered<i32>("i32"), define_ordered<u32>("u32");
    S2(T, T, T, "s_add_i32", (scc = (~(x ^ y) & (x ^ (x + y))) >> 31, x + y))
    S2(T, i16, T, "s_addk_i32", (scc = (~(x ^ y) & (x ^ (x + y))) >> 31, x + y))
    S2(T, T, T, "s_sub_i32", (scc = ((x ^ y) & (x ^ (x - y))) >> 31, x - y))
    S2(T, T, T, "s_add_u32", (scc = x + y < x, x + y))  S2(T, T, T, "s_sub_u32", (scc = x < y, x - y))
    scalar<T, T, T>("s_addc_u32", [](u32& scc, u64 x, u64 y) { return x += y + scc, scc = x >> 32 & 1, x; });
    scalar<T, T, T>("s_subb_u32", [](u32& scc, u64 x, u64 y) { return x -= y + scc, scc = x >> 32 & 1, x; });
    SHIFT_ADD(1) SHIFT_ADD(2) SHIFT_ADD(3) SHIFT_ADD(4)
    S2(T, T, T, "s_mul_hi_u32", u64(x) * y >> 32)       S2(T, i32, i32, "s_mul_hi_i32", i64(x) * y >> 32)
    S2(T, T, T, "s_mul_i32", x * y)                     LOGIC1(T, "s_abs_i32", i32(x) < 0 ? -x : x)
    S1(T, i16, "s_movk_i32", x)                         S1(T, T, "s_brev_b32", reversed(x))
    DO("s_and_saveexec_b64", save_exec(w, i, scalar_source<u64>(w, i, 0) & w.exec()))
    DO("s_andn2_saveexec_b64", save_exec(w, i, scalar_source<u64>(w, i, 0) & ~w.exec()))
    DO("s_branch", jump(w, i.target, true))
    DO("s_cbranch_scc0", jump(w, i.target, !w.scc))                DO("s_cbranch_scc1", jump(w, i.target, w.scc))
    DO("s_cbranch_vccz", jump(w, i.target, !w.scalar_pair(VCC)))
    DO("s_cbranch_vccnz", jump(w, i.target, w.scalar_pair(VCC)))
    DO("s_cbranch_execz", jump(w, i.target, !w.exec()))            DO("s_cbranch_execnz", jump(w, i.target, w.exec()))
    DO("s_nop", {})                                         DO("s_setprio", {})
    DO("s_endpgm", w.done = true)                           DO("s_barrier", w.waiting = true)
    define("s_waitcnt", [](Wave& w, const Instruction& i) {
        if (i.vmcnt >= 0) w.retire(w.vm, i.vmcnt);
        // Scalar loads return in any order: with one under way, only a count of 0 tells anything.
        if (i.lgkmcnt == 0 || (i.lgkmcnt > 0 && !w.scalar_loads)) w.retire(w.lgkm, i.lgkmcnt);
        w.scalar_loads &= i.lgkmcnt != 0;
    });
}
inline void define_integer() {
    using T = u32;
    T1("v_mov_b32", x)                  V1(u64, u64, "v_mov_b64", x)
    T1("v_not_b32", ~x)                 T1("v_bfrev_b32", reversed(x))
    T2("v_and_b32", x & y)              T2("v_or_b32", x | y)       T2("v_xor_b32", x ^ y)
    T2("v_add_u32", x + y)              V2(u16, u16, u16, "v_add_u16", x + y)
    T2("v_sub_u32", x - y)              T2("v_subrev_u32", y - x)   T2("v_sub_u32 clamp", x > y ? x - y : 0)
    T2("v_mul_lo_u32", x * y)           T2("v_mul_hi_u32", u64(x) * y >> 32)
    T2("v_lshlrev_b32", y << (x & 31))  V2(u64, T, u64, "v_lshlrev_b64", y << (x & 63))
    T2("v_lshrrev_b32", y >> (x & 31))  V2(u64, T, u64, "v_lshrrev_b64", y >> (x & 63))
    V2(i32, T, i32, "v_ashrrev_i32", y >> (x & 31))     V2(i64, T, i64, "v_ashrrev_i64", y >> (x & 63))
    T3("v_add3_u32", x + y + z)         T3("v_add_lshl_u32", (x + y) << (z & 31))
    T3("v_or3_b32", x | y | z)          T3("v_lshl_add_u32", (x << (y & 31)) + z)
    T3("v_and_or_b32", (x & y) | z)     V3(u64, u64, T, u64, "v_lshl_add_u64", (x << (y & 63)) + z)
    T3("v_xad_u32", (x ^ y) + z)        T3("v_lshl_or_b32", x << (y & 31) | z)
    T3("v_perm_b32", permuted(x, y, z)) V2(u16, u16, u16, "v_lshrrev_b16", y >> (x & 15))
    T3("v_bfe_u32", field(x, y & 31, z & 31))           V3(i32, i32, T, T, "v_bfe_i32", field(x, y & 31, z & 31))
    T2("v_mul_u32_u24", (x & 0xffffff) * (y & 0xffffff)) T3("v_mad_u32_u24", (x & 0xffffff) * (y & 0xffffff) + z)
    C2("v_add_co_u32", x + y)           C2("v_addc_co_u32", x + y + c)
    C2("v_sub_co_u32", x - y)           C2("v_subb_co_u32", x - y - c)
    C2("v_subrev_co_u32", y - x)        C2("v_subbrev_co_u32", y - x - c)
    masked<u64, T, T, u64>("v_mad_u64_u32", [](bool& c, u64 x, u64 y, u64 z) { return x *= y, c = x + z < z, x + z; });
    masked<u64, i32, i32, u64>("v_mad_i64_i32", [](bool&, i64 x, i64 y, u64 z) { return x * y + z; });
    masked<f32, f32, f32>("v_cndmask_b32", [](bool& c, f32 x, f32 y) { return c ? y : x; });
    DO("v_readfirstlane_b32", write_scalar(w, i, source<u32>(w, i, 0)[w.exec() ? std::countr_zero(w.exec()) : 0]))
    DO("v_readlane_b32", write_scalar(w, i, source<u32>(w, i, 0)[scalar_source<u32>(w, i, 1) & 63]))
    DO("v_writelane_b32", w.set_lane(i.out.index, scalar_source<u32>(w, i, 1) & 63, scalar_source<u32>(w, i, 0)))
}
template <class T> void define_floats(const std::string& type) {
    T2("v_add_" + type, x + y)              T2("v_max_" + type, (extreme<true>(x, y)))
    T2("v_mul_" + type, x * y)              T2("v_min_" + type, (extreme<false>(x, y)))
    T3("v_fma_" + type, std::fma(x, y, z))  T3("v_fmac_" + type, std::fma(x, y, z))
    T1("v_floor_" + type, std::floor(x))    T1("v_ceil_" + type, std::ceil(x))
    T1("v_trunc_" + type, std::trunc(x))    T1("v_rndne_" + type, std::nearbyint(x))
    V2(T, T, i32, "v_ldexp_" + type, std::ldexp(x, std::clamp(y, -5000, 5000)))
    vector<T, T>("v_frexp_mant_" + type, [](T x) { int e; return std::isfinite(x) ? std::frexp(x, &e) : x; });
    vector<i32, T>("v_frexp_exp_i32_" + type, [](T x) { int e; return std::frexp(x, &e), std::isfinite(x) ? e : 0; });
    V1(T, i32, "v_cvt_" + type + "_i32", x) V1(i32, T, "v_cvt_i32_" + type, clamped<i32>(x))
    V1(T, u32, "v_cvt_" + type + "_u32", x) V1(u32, T, "v_cvt_u32_" + type, clamped<u32>(x))
    masked<T, T, T, T>("v_div_scale_" + type, [](bool& flag, T s, T d, T n) { return div_scale(flag, s, d, n); });
    masked<T, T, T, T>("v_div_fmas_" + type, [](bool& flag, T x, T y, T z) { return div_fmas(flag, x, y, z); });
    T3("v_div_fixup_" + type, div_fixup(x, y, z)) V2(bool, T, u32, "v_cmp_class_" + type, class_of(x) & y)
}
inline void define_float() {
    using T = f32;
    define_floats<f32>("f32"), define_floats<f64>("f64");
    T2("v_sub_f32", x - y)                      T2("v_subrev_f32", y - x)
    T3("v_fmaak_f32", std::fma(x, y, z))        T3("v_fmamk_f32", std::fma(x, y, z))
    T3("v_max3_f32", (extreme<true>(extreme<true>(x, y), z)))   T1("v_sqrt_f32", std::sqrt(x))
    // Subnormal operands and results of these are flushed to 0.
    T1("v_exp_f32", flushed(f32(std::exp2(f64(flushed(x))))))
    T1("v_log_f32", f32(std::log2(f64(flushed(x)))))
    T1("v_rcp_f32", flushed(f32(1 / f64(flushed(x)))))
    T1("v_rcp_iflag_f32", flushed(f32(1 / f64(flushed(x)))))
    V1(f64, f64, "v_rcp_f64", shortened(1 / x)) V1(f64, f64, "v_rsq_f64", shortened(1 / std::sqrt(x)))
    V1(f64, T, "v_cvt_f64_f32", x)              V1(T, f64, "v_cvt_f32_f64", x)
    V1(f16, T, "v_cvt_f16_f32", x)              V1(T, f16, "v_cvt_f32_f16", x)
    V2(u32, f16, f16, "v_pack_b32_f16", bits(x) | bits(y) << 16)
    V2(Pair, Pair, Pair, "v_pk_add_f32", (Pair{x.low + y.low, x.high + y.high}))
    V2(Pair, Pair, Pair, "v_pk_mul_f32", (Pair{x.low * y.low, x.high * y.high}))
    V2(Pair, Pair, Pair, "v_pk_mov_b32", (Pair{x.low, y.low}))
    V3(Pair, Pair, Pair, Pair, "v_pk_fma_f32", (Pair{std::fma(x.low, y.low, z.low), std::fma(x.high, y.high, z.high)}))
    vector<f32, Mixed, Mixed, Mixed>("v_fma_mix_f32", [](Mixed x, Mixed y, Mixed z) { return fma(x, y, z); });
    vector<u32, Mixed, Mixed, Mixed, u32>("v_fma_mixlo_f16", [](Mixed x, Mixed y, Mixed z, u32 old) {
        return (old & 0xffff0000) | bits(f16(fma(x, y, z)));
    });
    define("v_mfma_f32_32x32x8_bf16", matrix<32, BF16, 4>), define("v_mfma_f32_16x16x16_bf16", matrix<16, BF16, 4>);
    define("v_mfma_f32_32x32x8_f16", matrix<32, F16, 4>), define("v_mfma_f32_16x16x16_f16", matrix<16, F16, 4>);
    define("v_mfma_f32_32x32x4_xf32", matrix<32, XF32, 2>), define("v_mfma_f32_16x16x8_xf32", matrix<16, XF32, 2>);
    define("v_mfma_f32_32x32x2_f32", matrix<32, F32, 1>), define("v_mfma_f32_16x16x4_f32", matrix<16, F32, 1>);
}
inline void define_all() {
    constexpr std::make_integer_sequence<int, 16> all;
    define_relations<i32>("i32", all), define_relations<i64>("i64", all), define_relations<f16>("f16", all);
    define_relations<u32>("u32", all), define_relations<u64>("u64", all), define_relations<f32>("f32", all);
    define_relations<u16>("u16", all), define_relations<f64>("f64", all);
    define_scalar(), define_integer(), define_float();
    // Of accesses, program.py reads the sizes in the rest of the name.
    define("buffer_load", buffer<false>), define("buffer_store", buffer<true>);
    define("global_load", global<false>), define("global_store", global<true>);
    define("ds_read", lds<false>), define("ds_write", lds<true>), define("s_load", scalar_load);
    DO("ds_swizzle_b32", exchange(w, i, 0, [&](int l) { return i.lanes[l]; }))
    DO("ds_bpermute_b32", exchange(w, i, 1, [&](int l) { return (w.v[i.source[0].index][l] + i.offset[0]) >> 2 & 63; }))
}
