// As many floats at a time as a register holds (see isa.h): compiler vector types. Intrinsics appear only
// where the language has no word for the instruction (fused multiply-add, the dot product of bfloat16
// pairs) or the compiler does not find it (widening loads).
//
// Nothing here is reordered by the compiler (-ffp-contract=off, no fast-math): what a lane computes is
// what is written, on every path of the same build.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "isa.h"

#define INLINE static inline __attribute__((always_inline))

namespace folospec {

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int8_t ByteVec __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef float FourFloats __attribute__((vector_size(16)));

constexpr int DOUBLES = LANES / 2;
typedef double DoubleVec __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(VECTOR_BYTES)));
typedef float HalfFloats __attribute__((vector_size(VECTOR_BYTES / 2)));

struct bfloat16 {
    uint16_t bits;
};

template <class To, class From>
INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE Vec splat(float value) { return as<Vec>(IntVec{} + as<int32_t>(value)); }  // bits, not a sum

// ---- the order of lanes -------------------------------------------------------------------------

// Lane i of the result is lane Pattern::at(i) of `a`, or of `b` from LANES on.
template <class Pattern, int... I>
INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pattern::at(I)...);
#else
    return __builtin_shuffle(a, b, (IntVec){Pattern::at(I)...});
#endif
}

template <class Pattern>
INLINE Vec shuffle(Vec a, Vec b) {
    return shuffle<Pattern>(a, b, std::make_integer_sequence<int, LANES>());
}

// Within every four lanes: those of `a` and `b` in turns, or in pairs; the low ones, or the high ones.
template <int HIGH>
struct InTurns {
    static constexpr int at(int i) { return (i & 1 ? LANES : 0) + (i & ~3) + 2 * HIGH + (i & 2) / 2; }
};
template <int HIGH>
struct InPairs {
    static constexpr int at(int i) { return (i & 2 ? LANES : 0) + (i & ~3) + 2 * HIGH + (i & 1); }
};

template <int D>
struct Swapped {
    static constexpr int at(int i) { return i ^ D; }
};

struct EvenThenOdd {
    static constexpr int at(int i) { return i < LANES / 2 ? 2 * i : 2 * (i - LANES / 2) + 1; }
};

template <int... I>
INLINE IntVec lane_numbers(std::integer_sequence<int, I...>) {
    return (IntVec){I...};
}
INLINE IntVec lane_numbers() { return lane_numbers(std::make_integer_sequence<int, LANES>()); }

// ---- numbers ------------------------------------------------------------------------------------

// a * b + c, rounded once where the machine can; a machine that cannot rounds twice, everywhere.
INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(FOLOSPEC_AVX512)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FOLOSPEC_AVX2)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FOLOSPEC_NEON)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(FOLOSPEC_AVX512)
    return (DoubleVec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FOLOSPEC_AVX2)
    return (DoubleVec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(FOLOSPEC_NEON)
    return (DoubleVec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

INLINE DoubleVec load_doubles(const float* from) {
    HalfFloats v;
    std::memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, DoubleVec);
}

INLINE Vec load(const bfloat16* from) {
#if defined(FOLOSPEC_AVX512)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(FOLOSPEC_AVX2)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    HalfVec halves;
    std::memcpy(&halves, from, sizeof halves);
    return as<Vec>(__builtin_convertvector(halves, UintVec) << 16);
#endif
}

INLINE Vec load(const int8_t* from) {
#if defined(FOLOSPEC_AVX512)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(FOLOSPEC_AVX2)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    ByteVec bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}

INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// The bits of bfloat16s, in the high halves of words: round to nearest, ties to even, as torch does; a
// NaN stays one.
INLINE UintVec round_to_bfloat16(Vec v) {
    UintVec bits = as<UintVec>(v);
    UintVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    UintVec is_nan = as<UintVec>(v != v);
    return ((is_nan & (bits | 0x400000u)) | (~is_nan & rounded)) & 0xffff0000u;
}

INLINE void store(bfloat16* to, Vec v) {
    HalfVec halves = __builtin_convertvector(round_to_bfloat16(v) >> 16, HalfVec);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of a vector's values, zeros behind them.
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
#if defined(FOLOSPEC_AVX512)
    asm("" : "+v"(value));
#elif defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(FOLOSPEC_NEON)
    asm("" : "+w"(value));
#endif
}

INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// The sum of a vector's halves, and of theirs, down to four floats.
template <int BYTES, class V>
INLINE FourFloats sum_halves(V v) {
    if constexpr (BYTES == sizeof(FourFloats)) return v;
    else {
        typedef float Half __attribute__((vector_size(BYTES / 2)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum_halves<BYTES / 2>(halves[0] + halves[1]);
    }
}

// The sums of four vectors, by one fixed tree, so that a sum is the same whichever three stand beside
// it: in every four lanes the first with the third and the second with the fourth, then these, then fours.
INLINE FourFloats sum_four(Vec a, Vec b, Vec c, Vec d) {
    Vec ab = shuffle<InTurns<0>>(a, b) + shuffle<InTurns<1>>(a, b);
    Vec cd = shuffle<InTurns<0>>(c, d) + shuffle<InTurns<1>>(c, d);
    return sum_halves<VECTOR_BYTES>(shuffle<InPairs<0>>(ab, cd) + shuffle<InPairs<1>>(ab, cd));
}

INLINE float sum(Vec v) { return sum_four(v, v, v, v)[0]; }

template <int D = LANES / 2>
INLINE float largest(Vec v) {
    if constexpr (D == 0) return v[0];
    else return largest<D / 2>(max(v, shuffle<Swapped<D>>(v, v)));
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

// The bfloat16s of every word in memory, as floats: the first ones, or the second ones.
template <int PART>
INLINE Vec load_widened(const bfloat16* from) {
    // Sixteen registers are just enough for a tile, if the words are loaded anew for their second part; the
    // compiler would keep them, and move sums out instead.
#if defined(FOLOSPEC_AVX2)
    if constexpr (PART == 1) asm("" : "+r"(from));
#endif
    UintVec pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return as<Vec>(PART == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

#if defined(FOLOSPEC_BF16_DOT)
// Pairs of bfloat16, as 32-bit words, times pairs, added to as many sums.
INLINE Vec dot_pairs(UintVec a, UintVec b, Vec sums) {
#if defined(FOLOSPEC_AVX512)
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return (Vec)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}
#endif

}  // namespace folospec
