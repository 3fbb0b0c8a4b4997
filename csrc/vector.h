// A vector register of floats, using the vector extensions of GCC and Clang, and functions on it.
//
// Compiled once per instruction set: CMake defines its name (TRM_ISA), the number of floats per register (TRM_WIDTH)
// and the rows of a micro-kernel's tile (TRM_TILE_ROWS). All code is in a namespace of that name and uses no inline
// function of the standard library, because the linker could keep a copy that another machine cannot run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define TRM_INLINE inline __attribute__((always_inline))
#define TRM_UNROLL _Pragma("GCC unroll 16")

namespace trm::TRM_ISA {

constexpr int W = TRM_WIDTH;
constexpr int kTileRows = TRM_TILE_ROWS;
constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * W;  // columns of a panel of a packed matrix
// Rows of a tile that is two panels wide, or 0 if there are too few registers.
constexpr int kWideRows = W == 16 ? 6 : 0;

typedef float Vec __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
// For loads and stores at any float address.
typedef float VecAnywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

TRM_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
TRM_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecAnywhere*>(p) = v; }
TRM_INLINE Vec splat(float x) { return x - Vec{}; }

// Loads the first `count` floats, the others 0; stores the first `count` floats.
TRM_INLINE Vec load_first(const float* p, int count) {
#ifdef __AVX512F__
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
    Vec v = {};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}
TRM_INLINE void store_first(float* p, Vec v, int count) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

TRM_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
TRM_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

template <int N>
struct Lanes {
    typedef float Type __attribute__((vector_size(N * 4)));
};

// Reduces the lanes of v by halves.
template <int N, class Combine>
TRM_INLINE float reduce(typename Lanes<N>::Type v, Combine combine) {
    if constexpr (N == 2) {
        return combine(v[0], v[1]);
    } else {
        typename Lanes<N / 2>::Type halves[2];
        __builtin_memcpy(halves, &v, sizeof(v));
        return reduce<N / 2>(combine(halves[0], halves[1]), combine);
    }
}

TRM_INLINE float sum(Vec v) {
    return reduce<W>(v, [](auto a, auto b) { return a + b; });
}
TRM_INLINE float max(Vec v) {
    return reduce<W>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Interleaves the even (or odd) blocks of S lanes of a and b.
template <int S, bool Odd, int... I>
TRM_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, ((I & S ? W + I - S : I) + (Odd ? S : 0))...);
#else  // GCC before 12
    return __builtin_shuffle(a, b, Bits{((I & S ? W + I - S : I) + (Odd ? S : 0))...});
#endif
}

// Transposes a W x W matrix.
template <int S = W / 2>
TRM_INLINE void transpose(Vec (&rows)[W]) {
    TRM_UNROLL for (int i = 0; i < W; ++i) {
        if (i & S) continue;
        const Vec a = rows[i], b = rows[i + S];
        rows[i] = interleave<S, false>(a, b, std::make_integer_sequence<int, W>{});
        rows[i + S] = interleave<S, true>(a, b, std::make_integer_sequence<int, W>{});
    }
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// 1 / x to 1 ulp, or 0 if the result would be subnormal. AVX-512 divides 16 floats in 16 cycles; an approximation and a
// Newton step take 4.
TRM_INLINE Vec reciprocal(Vec x) {
#ifdef __AVX512F__
    const Vec r = _mm512_maskz_rcp14_ps(0xffff, x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

// e^x to 1.5 ulp: x = k ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and k added to the exponent. x is clamped to
// [-87.3, 88.3] (1.2e-38 and 2.2e38); NaN propagates.
TRM_INLINE Vec exp(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's last bits are round(x / ln 2)
    const Vec low = splat(-87.3f), high = splat(88.3f);
    const Vec above = low > x ? low : x;
    const Vec clamped = high < above ? high : above;
    const Vec shifted = clamped * 1.44269504f + magic;
    const Vec k = shifted - magic;
#if defined(__FMA__) || defined(__aarch64__)
    const Vec r = clamped - k * 0.693147182f;
#else
    const Vec r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;  // two parts of ln 2: k times the first is exact
#endif
    Vec p = splat(1.3813146e-3f);
    p = p * r + 8.3694198e-3f;
    p = p * r + 4.1668457e-2f;
    p = p * r + 0.16666515f;
    p = p * r + 0.49999993f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    return _mm512_maskz_scalef_ps(0xffff, p, k);
#else
    return Vec(Bits(p) + (Bits(shifted) << 23));
#endif
}

// The cumulative distribution function and density of the normal distribution. The tail below 0 is
// erfcx(x) e^(-x^2) / 2 at x = |u| / sqrt 2. erfcx(x) is t = 1 / (1 + x / 2.5) times a polynomial in 1 - t, fitted for
// minimal relative error (4e-7, and a fifth of that for x < 1). The tail of a fitted erf has four times eager's error.
struct Normal {
    Vec cdf, density;
};
TRM_INLINE Normal normal(Vec u) {
    const Vec size = Vec(Bits(u) & 0x7fffffffu);
    const Vec t = reciprocal(1.0f + size * 0.28284271f);
    const Vec w = 1.0f - t;
    Vec p = splat(0.047294277f);
    p = p * w - 0.20754797f;
    p = p * w + 0.27760982f;
    p = p * w + 0.032592713f;
    p = p * w - 0.24045995f;
    p = p * w - 0.47131646f;
    p = p * w + 1.6084610f;
    p = p * w - 1.8209577f;
    p = p * w + 1.0f;
    const Vec e = exp(u * -0.5f * u);
    const Vec tail = 0.5f * t * p * e;
    return {u < 0.0f ? tail : 1.0f - tail, 0.39894228f * e};
}

// The smallest multiple of `of` that is at least `n`.
constexpr int64_t round_up(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Row stride of an activation in floats: whole panels, but not a multiple of 1 KiB, so that the rows of a tile map to
// different cache sets. It never decreases with more columns, because buffers are allocated for the maximum.
constexpr int64_t row_stride(int64_t columns) {
    const int64_t whole = round_up(columns, kPanel);
    return whole < 256 ? whole : max(whole, whole / 256 * 256 + 16);
}

}  // namespace trm::TRM_ISA
