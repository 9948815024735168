// Numbers as the machine has them: parts of floats, NaN, zeros, and what it rounds.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

template <class T> using Bits = std::conditional_t<sizeof(T) == 8, u64, std::conditional_t<sizeof(T) == 4, u32, u16>>;
template <class T> constexpr Bits<T> SIGN = Bits<T>(1) << (8 * sizeof(T) - 1);
template <class T> constexpr int DIGITS = std::numeric_limits<T>::digits - 1;
template <class T> Bits<T> bits(T x) { return std::bit_cast<Bits<T>>(x); }
template <class T> T from_bits(u64 x) { return std::bit_cast<T>(Bits<T>(x)); }
inline f32 to_f32(u32 x) { return from_bits<f32>(x); }
inline f32 half_to_f32(u32 x) { return from_bits<f16>(x); }

template <class T> int exponent(T x) { return bits(x) >> DIGITS<T> & (2 * std::numeric_limits<T>::max_exponent - 1); }
template <class T> bool is_quiet(T x) { return bits(x) >> (DIGITS<T> - 1) & 1; }
template <class T> T quiet(T x) { return from_bits<T>(bits(x) | Bits<T>(1) << (DIGITS<T> - 1)); }
template <class T> bool subnormal(T x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); }
inline f32 flushed(f32 x) { return subnormal(x) ? std::copysign(0.f, x) : x; }

// The larger, or the smaller: a signalling NaN gives its quieted self, a number wins over a quiet one, −0 < +0.
template <bool LARGER, class T> T extreme(T x, T y) {
    if (x != x && !is_quiet(x)) return quiet(x);
    if (y != y && !is_quiet(y)) return quiet(y);
    if (x != x || y != y) return x != x ? y : x;
    return (x == y ? !std::signbit(x) : x > y) == LARGER ? x : y;
}
template <class T> T clamped(f64 x) {
    return x != x ? 0 : T(std::clamp<f64>(x, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
// What the machine's reciprocals of float64 keep: about 24 digits.
inline f64 shortened(f64 x) { return std::isfinite(x) ? from_bits<f64>(bits(x) >> 28 << 28) : x; }
template <class T> u32 class_of(T x) {
    if (x != x) return is_quiet(x) ? 2 : 1;
    u32 step = std::isinf(x) ? 0 : x == 0 ? 3 : subnormal(x) ? 2 : 1;
    return std::signbit(x) ? 4u << step : 512u >> step;
}
inline u32 reversed(u32 x) {
    u32 out = 0;
    for (int k = 0; k < 32; k++) out |= (x >> k & 1) << (31 - k);
    return out;
}
template <class T> T field(T x, u32 offset, u32 width) {  // extends the sign of signed types
    constexpr u32 ALL = 8 * sizeof(T);
    width = std::min(width, ALL - offset);
    return width ? T(std::make_unsigned_t<T>(x) << (ALL - width - offset)) >> (ALL - width) : 0;
}
inline u32 permuted(u32 high, u32 low, u32 choice) {
    const u64 from = u64(high) << 32 | low;
    u32 out = 0;
    for (int k = 0; k < 4; k++) {
        u32 c = choice >> 8 * k & 255, sign = c < 8 ? 0 : from >> (16 * (c & 3) + 15) & 1;
        out |= (c >= 13 ? 255 : c == 12 ? 0 : c >= 8 ? 255 * sign : from >> 8 * c & 255) << 8 * k;
    }
    return out;
}

// Division: a quotient by Newton's iteration, whose operands are scaled where it would leave the range of exponents.

template <class T> constexpr int SCALE = sizeof(T) == 8 ? 128 : 64;
// Of s, the denominator d or the numerator n, its scaled self; `flag`: whether the quotient has to be scaled back.
template <class T> T div_scale(bool& flag, T s, T d, T n) {
    using Wide = std::conditional_t<sizeof(T) == 8, long double, f64>;
    auto tiny = [](Wide x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); };
    if (n == 0 || d == 0) return std::numeric_limits<T>::quiet_NaN();
    const bool small_inverse = tiny(1 / Wide(d)), small_quotient = tiny(Wide(n) / d);
    int shift = 0;
    if (exponent(n) - exponent(d) >= (sizeof(T) == 8 ? 768 : 96)) flag = true, shift = s == d;
    else if (subnormal(d)) shift = 1;
    else if (small_inverse && small_quotient) flag = true, shift = -(s == d);  // the document's + overflows
    else if (small_inverse) shift = -1;
    else if (small_quotient) flag = true, shift = s == n;
    else if (exponent(n) <= (sizeof(T) == 8 ? 53 : 23)) shift = 1;
    return std::ldexp(s, shift * SCALE<T>);
}
template <class T> T div_fmas(bool flag, T x, T y, T z) {
    const T sum = std::fma(x, y, z);
    if (!flag) return sum;
    if (exponent(z) >= std::numeric_limits<T>::max_exponent) return std::ldexp(sum, SCALE<T>);
    if (sizeof(T) == 8) return std::ldexp(sum, -SCALE<T>);
    return T(std::ldexp(f64(x) * f64(y) + f64(z), -SCALE<T>));  // rounded once
}
template <class T> T div_fixup(T q, T d, T n) {
    const T sign = std::signbit(d) != std::signbit(n) ? T(-1) : T(1), inf = std::numeric_limits<T>::infinity();
    if (n != n || d != d) return quiet(n != n ? n : d);
    if ((d == 0 && n == 0) || (std::isinf(d) && std::isinf(n))) return -std::numeric_limits<T>::quiet_NaN();
    if (d == 0 || std::isinf(n)) return sign * inf;
    bool vanishes = std::isinf(d) || n == 0 || exponent(n) - exponent(d) < (sizeof(T) == 8 ? -1075 : -150);
    return vanishes ? sign * T(0) : q != q ? sign * inf : std::copysign(q, sign);
}
