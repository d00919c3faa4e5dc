// Sixteen floats at a time, whatever the instruction set: compiler vector types, which the compiler
// splits where registers are narrower. Intrinsics appear only where the language has no word for the
// instruction (fused multiply-add, the dot product of bfloat16 pairs) or the compiler does not find it
// (widening loads).
//
// Nothing here is reordered by the compiler (-ffp-contract=off, no fast-math): what a lane computes is
// what is written, on every path of the same machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace folospec {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UintVec __attribute__((vector_size(64)));
typedef int8_t ByteVec __attribute__((vector_size(16)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));
typedef float FourFloats __attribute__((vector_size(16)));

struct bfloat16 {
    uint16_t bits;
};

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

template <class To, class From>
INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Vec splat(float value) { return as<Vec>(IntVec{} + as<int32_t>(value)); }  // bits, not a sum

// a * b + c, rounded once where the machine can; a machine that cannot rounds twice, everywhere.
INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    std::memcpy(z, &c, sizeof z);
    for (int half = 0; half < 2; half++) x[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
    std::memcpy(&a, x, sizeof a);
    return a;
#elif defined(__aarch64__)
    Vec out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return out;
#else
    return a * b + c;
#endif
}

INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

INLINE Vec load(const bfloat16* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
    HalfVec halves;
    std::memcpy(&halves, from, sizeof halves);
    return as<Vec>(__builtin_convertvector(halves, UintVec) << 16);
#endif
}

INLINE Vec load(const int8_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
    ByteVec bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}

INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// Round to nearest, ties to even, as torch does; a NaN stays one.
INLINE void store(bfloat16* to, Vec v) {
    UintVec bits = as<UintVec>(v);
    UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    UintVec is_nan = as<UintVec>(v != v);
    rounded = (is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded);
    HalfVec halves = __builtin_convertvector(rounded, HalfVec);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of sixteen values, zeros behind them.
template <class T>
INLINE Vec load_part(const T* from, int count) {
    T padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
INLINE void store_part(T* to, Vec v, int count) {
    T whole[LANES];
    store(whole, v);
    std::memcpy(to, whole, count * sizeof(T));
}

// Make the compiler load a value once and keep it in a register. It would rather make it the memory
// operand of every instruction that uses it, and loads are what a tile has least to spare of.
template <class T>
INLINE void keep(T& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#endif
}

INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// The sums of four vectors, by one fixed tree, so that a sum is the same whichever three stand beside
// it: neighbours in fours, then the halves, then the quarters.
INLINE FourFloats sum_four(Vec a, Vec b, Vec c, Vec d) {
    // Of each two, one keeps its place and the other comes over: a blend and a shuffle, where taking
    // evens and odds apart would be two shuffles.
    Vec ab = SHUFFLE(a, b, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
             SHUFFLE(a, b, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
    Vec cd = SHUFFLE(c, d, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
             SHUFFLE(c, d, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
    Vec all = SHUFFLE(ab, cd, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
              SHUFFLE(ab, cd, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
    all = all + SHUFFLE(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    all = all + SHUFFLE(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    FourFloats low;
    std::memcpy(&low, &all, sizeof low);
    return low;
}

INLINE float sum(Vec v) { return sum_four(v, v, v, v)[0]; }

INLINE float largest(Vec v) {
    v = max(v, SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = max(v, SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = max(v, SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = max(v, SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

// e^x to about one unit in the last place; 0 below -87.3, e^88 above 88; a NaN stays one.
INLINE Vec exp(Vec x) {
    x = x > splat(88.0f) ? splat(88.0f) : x;
    IntVec underflow = x < splat(-87.3f);
    x = underflow ? splat(-87.3f) : x;
    // Adding and taking away 1.5 * 2^23 rounds to an integer.
    Vec shifted = fma(x, splat(1.44269504088896341f), splat(12582912.0f));
    Vec n = shifted - 12582912.0f;
    Vec r = fma(n, splat(-0.693145751953125f), x);
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    Vec y = splat(1.9875691500e-4f);
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(y, r * r, r) + 1.0f;
    IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    y = y * as<Vec>(power);
    return as<Vec>(as<IntVec>(y) & ~underflow);
}

// Swap rows and columns of a 16 x 16 block: four rounds, each exchanging halves between rows that
// are 8, 4, 2 and 1 apart.
INLINE void transpose(Vec rows[LANES]) {
    for (int i = 0; i < 8; i++) {
        Vec a = rows[i], b = rows[i + 8];
        rows[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        rows[i + 8] = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < LANES; i += 8)
        for (int j = i; j < i + 4; j++) {
            Vec a = rows[j], b = rows[j + 4];
            rows[j] = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            rows[j + 4] = SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int i = 0; i < LANES; i += 4)
        for (int j = i; j < i + 2; j++) {
            Vec a = rows[j], b = rows[j + 2];
            rows[j] = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            rows[j + 2] = SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < LANES; i += 2) {
        Vec a = rows[i], b = rows[i + 1];
        rows[i] = SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        rows[i + 1] = SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

// Sixteen pairs of bfloat16, as 32-bit words, times sixteen pairs, added to sixteen sums.
INLINE Vec dot_pairs(UintVec a, UintVec b, Vec sums) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums = fma(as<Vec>(a << 16), as<Vec>(b << 16), sums);
    return fma(as<Vec>(a & 0xffff0000u), as<Vec>(b & 0xffff0000u), sums);
#endif
}

}  // namespace folospec
