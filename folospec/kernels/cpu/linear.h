// y = x W^T for few rows and for many, with one order of summation for both.
//
// A weight row and an activation row are walked together, a step of `STEP` columns at a time, into
// sixteen partial sums, which one fixed tree adds up at the end. That order is a matter of the two
// rows alone: how many rows run, which tile they are in and which thread computes them changes which
// sums are in registers at the same time, never what a sum is.
//
//              K ->                   a tile: MR rows of x against NR rows of W, MR * NR sums in
//        +--------------+             registers, so that a row of W is read once for MR rows of x
//   x  M | ====>        |
//        +--------------+             few rows:   W streams from memory, x stays near
//   W    | ====>        |             many rows:  a block of W stays in the second-level cache while
//   out  | ====>        |                         x passes by; K is cut in chunks and the sums wait
//        +--------------+                         in between, as they are, in all their lanes
#pragma once

#include <algorithm>

#include "vec.h"

namespace folospec {

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// What one step does, for each way to keep a weight. `X` is the type of the activations it wants.
struct Float32Weight {
    typedef float W;
    typedef float X;
    typedef Vec Operand;
    static constexpr int STEP = 16;
    INLINE Vec load_w(const float* w) { return load(w); }
    INLINE Vec load_x(const float* x) { return load(x); }
    INLINE Vec accumulate(Vec w, Vec x, Vec sums) { return fma(w, x, sums); }
};

struct BFloat16Weight {
    typedef bfloat16 W;
    typedef bfloat16 X;
    typedef UintVec Operand;
    static constexpr int STEP = 32;
    INLINE UintVec load_w(const bfloat16* w) {
        UintVec v;
        std::memcpy(&v, w, sizeof v);
        return v;
    }
    INLINE UintVec load_x(const bfloat16* x) { return load_w(x); }
    INLINE Vec accumulate(UintVec w, UintVec x, Vec sums) { return dot_pairs(w, x, sums); }
};

struct Int8Weight {
    typedef int8_t W;
    typedef float X;
    typedef Vec Operand;
    static constexpr int STEP = 16;
    INLINE Vec load_w(const int8_t* w) { return load(w); }
    INLINE Vec load_x(const float* x) { return load(x); }
    INLINE Vec accumulate(Vec w, Vec x, Vec sums) { return fma(w, x, sums); }
};

struct Matrix {
    const void* data;    // [out, in], row by row
    const float* scale;  // [out] for int8, else null
    const float* bias;   // [out] or null
    int64_t out, in;
    int64_t format;
};

constexpr int ROW_TILE = 6;       // with four outputs: 24 sums, of 32 registers
constexpr int FEW_ROWS = 8;       // run in one tile, of three outputs above six rows
constexpr int BLOCK_OUT = 32;     // outputs that stay in the cache while many rows pass
constexpr int PREFETCH_BYTES = 1024;
constexpr int CHUNK_BYTES = 2048;  // of a weight row: four of them and six of x fit the first level

// Add columns [begin, end) to the sums of MR x NR outputs. `end` need not be a multiple of STEP: the
// rest is padded with zeros.
// `AHEAD`: fetch the weights to come, which a stream from memory is glad of.
template <class F, int MR, int NR, bool AHEAD>
INLINE void add_columns(const typename F::W* const w[NR], const typename F::X* x, int64_t x_stride,
                        int64_t begin, int64_t end, Vec sums[MR][NR]) {
    int64_t k = begin;
    for (; k + F::STEP <= end; k += F::STEP) {
        typename F::Operand weights[NR];
        for (int j = 0; j < NR; j++) {
            weights[j] = F::load_w(w[j] + k);
            if (AHEAD) __builtin_prefetch((const char*)(w[j] + k) + PREFETCH_BYTES);
        }
        for (int i = 0; i < MR; i++) {
            typename F::Operand row = F::load_x(x + i * x_stride + k);
            for (int j = 0; j < NR; j++) sums[i][j] = F::accumulate(weights[j], row, sums[i][j]);
        }
    }
    if (k < end) {
        size_t rest = end - k;
        for (int i = 0; i < MR; i++) {
            typename F::X row[F::STEP] = {};
            std::memcpy(row, x + i * x_stride + k, rest * sizeof(typename F::X));
            for (int j = 0; j < NR; j++) {
                typename F::W weight[F::STEP] = {};
                std::memcpy(weight, w[j] + k, rest * sizeof(typename F::W));
                sums[i][j] = F::accumulate(F::load_w(weight), F::load_x(row), sums[i][j]);
            }
        }
    }
}

// The last word on a tile: the tree, the scale, the bias, and the residual if there is one.
template <int MR, int NR>
INLINE void finish(Vec sums[MR][NR], const Matrix& m, int64_t first, int64_t count, float* y,
                   int64_t y_stride, bool add) {
    for (int i = 0; i < MR; i++) {
        float totals[4];
        sum_four(sums[i][0], sums[i][NR > 1 ? 1 : 0], sums[i][NR > 2 ? 2 : 0], sums[i][NR > 3 ? 3 : 0],
                 totals);
        for (int j = 0; j < NR && j < count; j++) {
            float total = totals[j];
            if (m.scale) total *= m.scale[first + j];
            if (m.bias) total += m.bias[first + j];
            float* to = y + i * y_stride + first + j;
            *to = add ? *to + total : total;
        }
    }
}

// Rows of outputs [first, first + count) of a matrix; past the end the last one stands in.
template <class F, int NR>
INLINE void point(const Matrix& m, int64_t first, int64_t count, const typename F::W* w[NR]) {
    const typename F::W* data = (const typename F::W*)m.data;
    for (int j = 0; j < NR; j++) w[j] = data + (first + std::min<int64_t>(j, count - 1)) * m.in;
}

template <class F, int MR, int NR>
void few_rows(const Matrix& m, const typename F::X* x, int64_t x_stride, float* y, int64_t y_stride,
              int64_t begin, int64_t end, bool add) {
    for (int64_t first = begin; first < end; first += NR) {
        int64_t count = std::min<int64_t>(NR, end - first);
        const typename F::W* w[NR];
        point<F, NR>(m, first, count, w);
        Vec sums[MR][NR] = {};
        add_columns<F, MR, NR, true>(w, x, x_stride, 0, m.in, sums);
        finish<MR, NR>(sums, m, first, count, y, y_stride, add);
    }
}

template <class F, int MR>
void block_of_rows(const Matrix& m, const typename F::X* x, int64_t x_stride, float* y,
                   int64_t y_stride, int64_t begin, int64_t end, bool add) {
    constexpr int NR = 4, GROUPS = BLOCK_OUT / NR;
    constexpr int64_t CHUNK = CHUNK_BYTES / sizeof(typename F::W);
    Vec sums[GROUPS][MR][NR] = {};
    int64_t groups = (end - begin + NR - 1) / NR;
    for (int64_t k = 0; k < m.in; k += CHUNK)
        for (int64_t g = 0; g < groups; g++) {
            const typename F::W* w[NR];
            point<F, NR>(m, begin + g * NR, std::min<int64_t>(NR, end - begin - g * NR), w);
            Vec local[MR][NR];
            std::memcpy(local, sums[g], sizeof local);
            add_columns<F, MR, NR, false>(w, x, x_stride, k, std::min(k + CHUNK, m.in), local);
            std::memcpy(sums[g], local, sizeof local);
        }
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = begin + g * NR;
        finish<MR, NR>(sums[g], m, first, std::min<int64_t>(NR, end - first), y, y_stride, add);
    }
}

// Outputs [begin, end) for all rows: y[row, out] (+)= sum.
template <class F>
void linear_range(const Matrix& m, const typename F::X* x, int64_t rows, int64_t x_stride, float* y,
                  int64_t y_stride, int64_t begin, int64_t end, bool add) {
#define FEW(MR, NR) \
    case MR: return few_rows<F, MR, NR>(m, x, x_stride, y, y_stride, begin, end, add)
    switch (rows) {
        case 0: return;
        FEW(1, 4);
        FEW(2, 4);
        FEW(3, 4);
        FEW(4, 4);
        FEW(5, 4);
        FEW(6, 4);
        FEW(7, 3);
        FEW(8, 3);
    }
#undef FEW
    for (int64_t out = begin; out < end; out += BLOCK_OUT) {
        int64_t out_end = std::min(out + BLOCK_OUT, end);
        for (int64_t row = 0; row < rows;) {
            // Rows left over are shared out: 13 rows run as 5, 4 and 4, and no tile is nearly empty.
            int64_t left = rows - row, tiles = (left + ROW_TILE - 1) / ROW_TILE;
            int64_t size = (left + tiles - 1) / tiles;
            const typename F::X* from = x + row * x_stride;
            float* to = y + row * y_stride;
#define BLOCK(MR)                                                             \
    case MR: block_of_rows<F, MR>(m, from, x_stride, to, y_stride, out, out_end, add); break
            switch (size) {
                BLOCK(1);
                BLOCK(2);
                BLOCK(3);
                BLOCK(4);
                BLOCK(5);
                BLOCK(6);
            }
#undef BLOCK
            row += size;
        }
    }
}

// The activations of a matrix product, in both types that a weight may want.
struct Operand {
    float* wide;
    bfloat16* narrow;
    int64_t stride;
};

INLINE void linear_part(const Matrix& m, const Operand& x, int64_t rows, float* y, int64_t y_stride,
                        int64_t begin, int64_t end, bool add) {
    switch (m.format) {
        case FLOAT32:
            return linear_range<Float32Weight>(m, x.wide, rows, x.stride, y, y_stride, begin, end, add);
        case BFLOAT16:
            return linear_range<BFloat16Weight>(m, x.narrow, rows, x.stride, y, y_stride, begin, end, add);
        case INT8:
            return linear_range<Int8Weight>(m, x.wide, rows, x.stride, y, y_stride, begin, end, add);
    }
}

}  // namespace folospec
