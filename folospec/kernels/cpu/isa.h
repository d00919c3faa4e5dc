// What this build computes with. The only place that asks for the instruction set: widths, tiles and the
// order of partial sums follow from the constants below, and `vec.h` has the few instructions themselves.
//
//                  vector     registers   pairs of bfloat16 in one instruction
//     AVX-512      16 floats  32          with AVX512_BF16
//     AVX2, FMA     8 floats  16          -
//     NEON          4 floats  32          with BF16
//     plain         4 floats  16 (x86-64) -
//
// Builds may differ from each other in the last bits; within one a sum is the same on every path.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FOLOSPEC_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define FOLOSPEC_AVX2 1
#elif defined(__aarch64__)
#define FOLOSPEC_NEON 1
#endif

#if defined(__AVX512BF16__) || (defined(FOLOSPEC_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define FOLOSPEC_BF16_DOT 1
#endif

namespace folospec {

#if defined(FOLOSPEC_AVX512)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(FOLOSPEC_AVX2)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(FOLOSPEC_NEON)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif
constexpr int LANES = VECTOR_BYTES / sizeof(float);

// A tile of a product has rows * outputs sums in registers, next to a weight of each output and one
// activation. Rows are cut in tiles of ROW_TILE; up to FEW_ROWS run in one. A weight of two parts needs a
// register more, for what takes it apart.
constexpr int ROW_TILE = 6, FEW_ROWS = REGISTERS == 32 ? 8 : 6;
constexpr int outputs_of(int rows, int parts) {
    if (rows == 1) return 8;  // hides that every sum waits for the one before it
    if (REGISTERS == 32) return rows <= 6 ? 4 : 3;
    if (rows > 4) return 2;
    return rows == 2 || (rows == 3 && parts == 1) ? 4 : 3;
}

// In which order memory is asked for the weights that come next, beside the machine's own prefetching: not
// at all, in the order of addresses, or for the same columns of the rows that come next.
enum Fetching : int {
    NOT_AT_ALL,
    IN_ORDER,
    BY_ROWS,
};

// Which rows of a matrix, read side by side, the machine's own prefetching follows. Intel's follows many,
// and is disturbed by requests in another order (measured on a Sapphire Rapids: 9 GB/s in the order of
// addresses, 12 to 13 by rows). A Zen 4 takes four for noise (25 to 33 GB/s without requests, 40 to 50 in
// the order of addresses, where reading alone gives 50). A Zen 3, the last without AVX-512, follows long
// ones (float32 rows of 8 kB for one row of activations: 19 GB/s in order, 21 by rows, 25 without requests;
// bfloat16 rows of 1 kB: 9, 8 and 7).
enum Follows : int {
    ALL_ROWS,
    LONG_ROWS,
    NO_ROWS,
};

inline Follows follows() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel")) return ALL_ROWS;
    if (!__builtin_cpu_supports("avx512f")) return LONG_ROWS;
#endif
    return NO_ROWS;
}

// While weights of `row_bytes` a row stream by for so many rows of activations.
inline Fetching streaming(Follows own, int rows, int64_t row_bytes) {
    if (own == ALL_ROWS) return BY_ROWS;
    if (own == NO_ROWS || row_bytes < 3072) return IN_ORDER;
    return rows == 1 && row_bytes >= 4096 ? NOT_AT_ALL : BY_ROWS;
}

// Attention keeps this many sums in registers: those of a few queries, times a part of a tile's keys or
// of a head.
constexpr int ATTENTION_SUMS = REGISTERS == 32 ? 16 : 8;

inline const char* instruction_set() {
#if defined(FOLOSPEC_AVX512) && defined(FOLOSPEC_BF16_DOT)
    return "AVX-512 with bfloat16";
#elif defined(FOLOSPEC_AVX512)
    return "AVX-512";
#elif defined(FOLOSPEC_AVX2)
    return "AVX2";
#elif defined(FOLOSPEC_NEON) && defined(FOLOSPEC_BF16_DOT)
    return "NEON with bfloat16";
#elif defined(FOLOSPEC_NEON)
    return "NEON";
#else
    return "no vector instructions in particular";
#endif
}

}  // namespace folospec
