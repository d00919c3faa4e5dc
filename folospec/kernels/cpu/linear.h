// y = x W^T for few rows and for many, with one order of summation for both.
//
// A weight row and an activation row are walked together, a vector of columns at a time, into LANES partial
// sums, which one fixed tree adds up at the end. That order is a matter of the two rows alone: how many
// rows run, which tile they are in and which thread computes them changes which sums are in registers at
// the same time, never what a sum is.
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
#include <type_traits>

#include "vec.h"

namespace folospec {

enum Format : int32_t {
    FLOAT32 = 0,
    BFLOAT16 = 1,
    INT8 = 2,
};

// What a step does, for each way to keep a weight. A step is one load of a weight row, COLUMNS of them; it
// has PARTS, each one vector of what that load holds against one vector of `X`, the activations it wants;
// `put_x` writes LANES of a step's activations, from `column` of the step on.
template <class Weight>
struct WidenedWeight {
    typedef Weight W;
    typedef float X;
    static constexpr int PARTS = 1, COLUMNS = LANES;
    template <int PART>
    INLINE Vec load_w(const Weight* w) { return load(w); }
    INLINE void put_x(float* step, int64_t column, Vec v) { store(step + column, v); }
    INLINE Vec load_x(const float* x) { return load(x); }
    INLINE Vec accumulate(Vec w, Vec x, Vec sums) { return fma(w, x, sums); }
};

typedef WidenedWeight<float> Float32Weight;
typedef WidenedWeight<int8_t> Int8Weight;

#if defined(FOLOSPEC_BF16_DOT)
// Where there is an instruction for pairs.
struct BFloat16Weight {
    typedef bfloat16 W;
    typedef bfloat16 X;
    static constexpr int PARTS = 1, COLUMNS = 2 * LANES;
    template <int PART>
    INLINE UintVec load_w(const bfloat16* w) { return load_x(w); }
    INLINE void put_x(bfloat16* step, int64_t column, Vec v) { store(step + column, v); }
    INLINE UintVec load_x(const bfloat16* x) {
        UintVec v;
        std::memcpy(&v, x, sizeof v);
        return v;
    }
    INLINE Vec accumulate(UintVec w, UintVec x, Vec sums) { return dot_pairs(w, x, sums); }
};
#else
// Where there is none: even columns, then odd ones, as a load has them in the halves of its words. The
// activations, rounded all the same, are floats and lie in that order.
struct BFloat16Weight {
    typedef bfloat16 W;
    typedef float X;
    static constexpr int PARTS = 2, COLUMNS = 2 * LANES;
    template <int PART>
    INLINE Vec load_w(const bfloat16* w) { return load_widened<PART>(w); }
    INLINE void put_x(float* step, int64_t column, Vec v) {
        Vec rounded = as<Vec>(round_to_bfloat16(v)), parts = shuffle<EvenThenOdd>(rounded, rounded);
        std::memcpy(step + column / 2, &parts, sizeof parts / 2);
        std::memcpy(step + LANES + column / 2, (char*)&parts + sizeof parts / 2, sizeof parts / 2);
    }
    INLINE Vec load_x(const float* x) { return load(x); }
    INLINE Vec accumulate(Vec w, Vec x, Vec sums) { return fma(w, x, sums); }
};
#endif

struct Matrix {
    const void* data;    // [out, in], row by row
    const float* scale;  // [out] for int8, else null
    const float* bias;   // [out] or null
    int64_t out, in;
    int64_t format;
};

constexpr int STREAM_ROWS = 4;  // up to these, W goes by once and x is near anyway
constexpr int BLOCK_OUT = 24;   // outputs that stay in the cache while rows pass
// Of an activation row, what is worked off at a time. While W comes from memory, a chunk of x has to stay in
// the first level; when many tiles share what has come, longer chunks cost fewer interruptions.
constexpr int CHUNK_BYTES = 2048, LONG_CHUNK_BYTES = 4096, MANY_TILES = 4;
// How far ahead of a stream from memory to ask, and in which order; no nearer than the second level.
constexpr int AHEAD_BYTES = 16384, LINE_BYTES = 64;
inline const Follows FOLLOWS = follows();

// Rows are cut in tiles: up to FEW_ROWS are one, more are shared out over tiles of at most ROW_TILE, so
// that none is nearly empty (13 rows run as 5, 4 and 4).
struct Tiling {
    int64_t rows, tiles, size, larger;  // the first `larger` tiles have one row more than `size`

    explicit Tiling(int64_t count, bool single_rows = false)
        : rows(count), tiles(single_rows ? count : (count <= FEW_ROWS ? 1 : (count + ROW_TILE - 1) / ROW_TILE)),
          size(count ? count / tiles : 0), larger(count ? count % tiles : 0) {}
    int64_t first(int64_t tile) const { return tile * size + std::min(tile, larger); }
    int64_t tile_of(int64_t row) const {
        int64_t in_larger = larger * (size + 1);
        return row < in_larger ? row / (size + 1) : larger + (row - in_larger) / size;
    }
};

// The activations of a product, in the order in which a tile reads them: step by step of K, and in a
// step row by row. A tile of one row is a row as it is.
//
//     tile of 3 rows     a0 b0 c0 | a1 b1 c1 | ...     x0 is a step's columns of row x
//
// Rows one page apart would fight for the same few places of the first-level cache.
struct Operand {
    void* data;
    int64_t columns;  // in whole steps; what is beyond the matrix's own is zero
    int64_t format;   // of the weight it is for
    Tiling tiling;

    template <class X>
    X* tile(int64_t index) const {
        return (X*)data + tiling.first(index) * columns;
    }
};

INLINE int64_t step_of(int64_t format) { return format == BFLOAT16 ? BFloat16Weight::COLUMNS : LANES; }
INLINE int64_t padded_columns(int64_t columns, int64_t format) {
    int64_t step = step_of(format);
    return (columns + step - 1) / step * step;
}

// One row of an operand, to be written a vector of columns at a time.
struct OperandRow {
    char* base;
    int64_t step, rows;
    bool is_rounded;

    OperandRow(const Operand& x, int64_t row) : step(step_of(x.format)), is_rounded(x.format == BFLOAT16) {
        int64_t tile = x.tiling.tile_of(row), first = x.tiling.first(tile);
        rows = x.tiling.first(tile + 1) - first;
        int64_t bytes = is_rounded ? sizeof(BFloat16Weight::X) : sizeof(float);
        base = (char*)x.data + (first * x.columns + (row - first) * step) * bytes;
    }
    inline void put(int64_t column, Vec v) const {
        int64_t within = column & (step - 1), place = (column - within) * rows;  // a step is a power of two
        if (is_rounded) BFloat16Weight::put_x((BFloat16Weight::X*)base + place, within, v);
        else Float32Weight::put_x((float*)base + place, within, v);
    }
};

// What memory should bring meanwhile: as many bytes as are used, from `from` on `IN_ORDER` of addresses, or
// `BY_ROWS`, numbers that lie `distance` behind those that are read. Tiles that share a block share that too:
// of every NR lines this one asks for [first, end).
template <class W>
struct Ahead {
    Fetching order;
    const W* from;
    int64_t distance;
    int first, end;
};

// Add one step, at column k of the weights and at x, whose rows are so many numbers apart.
template <class F, int PART, int MR, int NR>
INLINE void add_step(const typename F::W* const w[NR], int64_t k, const typename F::X* x, int64_t apart,
                     Vec sums[MR][NR]) {
    if constexpr (PART < F::PARTS) {
        decltype(F::template load_w<PART>(w[0])) weights[NR];
        for (int j = 0; j < NR; j++) weights[j] = F::template load_w<PART>(w[j] + k);
        for (int i = 0; i < MR; i++) {
            auto row = F::load_x(x + i * apart + PART * LANES);
            keep(row);
            for (int j = 0; j < NR; j++) sums[i][j] = F::accumulate(weights[j], row, sums[i][j]);
        }
        add_step<F, PART + 1, MR, NR>(w, k, x, apart, sums);
    }
}

// Add columns [begin, end) to the sums of MR x NR outputs, a line of every weight row at a time. Where the
// weight's columns end within a step, zeros follow.
template <class F, int MR, int NR>
INLINE void add_columns(const typename F::W* const w[NR], const typename F::X* x, int64_t begin,
                        int64_t end, const Ahead<typename F::W>& ahead, Vec sums[MR][NR]) {
    constexpr int LINE = std::max<int>(LINE_BYTES / sizeof(typename F::W), F::COLUMNS);
    int64_t k = begin;
    for (; k + LINE <= end; k += LINE) {
        for (int j = 0; j < NR; j++) {
            if (ahead.order == NOT_AT_ALL || j < ahead.first || j >= ahead.end) continue;
            bool by_rows = ahead.order == BY_ROWS;
            __builtin_prefetch(by_rows ? w[j] + k + ahead.distance : ahead.from + (k - begin) * NR + j * LINE, 0, 2);
        }
        for (int s = 0; s < LINE; s += F::COLUMNS)
            add_step<F, 0, MR, NR>(w, k + s, x + (k + s) * MR, F::COLUMNS, sums);
    }
    for (; k + F::COLUMNS <= end; k += F::COLUMNS)
        add_step<F, 0, MR, NR>(w, k, x + k * MR, F::COLUMNS, sums);
    if (k < end) {
        typename F::W parts[NR][F::COLUMNS] = {};
        const typename F::W* last[NR];
        for (int j = 0; j < NR; j++) {
            std::memcpy(parts[j], w[j] + k, (end - k) * sizeof(typename F::W));
            last[j] = parts[j];
        }
        add_step<F, 0, MR, NR>(last, 0, x + k * MR, F::COLUMNS, sums);
    }
}

// The last word on up to four outputs of a row: the tree, the scale, the bias, and the residual if there is
// one.
template <int NR>
INLINE void finish_four(const Vec sums[NR], int first_sum, const Matrix& m, int64_t first, int64_t count,
                        float* to, bool add) {
    FourFloats scale = {1, 1, 1, 1}, bias = {}, before = {};
    size_t bytes = std::min<int64_t>(std::min(NR - first_sum, 4), count) * sizeof(float);
    auto at = [&](int j) { return sums[std::min(first_sum + j, NR - 1)]; };
    FourFloats total = sum_four(at(0), at(1), at(2), at(3));
    if (m.scale) std::memcpy(&scale, m.scale + first, bytes);
    if (m.bias) std::memcpy(&bias, m.bias + first, bytes);
    if (m.scale) total = total * scale;
    if (m.bias) total = total + bias;
    if (bytes == sizeof total) {
        if (add) std::memcpy(&before, to + first, sizeof before);
        total = add ? before + total : total;
        std::memcpy(to + first, &total, sizeof total);
    } else {
        if (add) std::memcpy(&before, to + first, bytes);
        total = add ? before + total : total;
        std::memcpy(to + first, &total, bytes);
    }
}

template <int MR, int NR>
INLINE void finish(Vec sums[MR][NR], const Matrix& m, int64_t first, int64_t count, float* y,
                   int64_t y_stride, bool add) {
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR && j < count; j += 4)
            finish_four<NR>(sums[i], j, m, first + j, count - j, y + i * y_stride, add);
}

// Rows of outputs [first, first + count) of a matrix; past the end the last one stands in.
template <class F, int NR>
INLINE void point(const Matrix& m, int64_t first, int64_t count, const typename F::W* w[NR]) {
    const typename F::W* data = (const typename F::W*)m.data;
    for (int j = 0; j < NR; j++) w[j] = data + (first + std::min<int64_t>(j, count - 1)) * m.in;
}

// Outputs [begin, end) for the rows of one tile, a few outputs at a time from end to end.
template <class F, int MR, int NR>
void stream_tile(const Matrix& m, const typename F::X* x, float* y, int64_t y_stride, int64_t begin,
                 int64_t end, bool add) {
    for (int64_t first = begin; first < end; first += NR) {
        int64_t count = std::min<int64_t>(NR, end - first);
        const typename F::W* w[NR];
        point<F, NR>(m, first, count, w);
        Vec sums[MR][NR] = {};
        Ahead<typename F::W> ahead = {streaming(FOLLOWS, MR, m.in * sizeof(typename F::W)),
                                      w[0] + NR * m.in + AHEAD_BYTES / sizeof(typename F::W), NR * m.in, 0, NR};
        add_columns<F, MR, NR>(w, x, 0, m.in, ahead, sums);
        finish<MR, NR>(sums, m, first, count, y, y_stride, add);
    }
}

// The same with K in chunks: a chunk of x stays in the first level for all the outputs of the block.
// The sums wait between chunks as they are, in all their lanes, so that this changes no bit. Meanwhile
// the next block comes from memory.
template <class F, int MR, int NR>
void block_tile(const Matrix& m, const typename F::X* x, float* y, int64_t y_stride, int64_t begin,
                int64_t end, bool add, int64_t tile, int64_t tiles) {
    constexpr int GROUPS = BLOCK_OUT / NR;
    int64_t chunk = (tiles < MANY_TILES ? CHUNK_BYTES : LONG_CHUNK_BYTES) / sizeof(typename F::X);
    Vec waiting[GROUPS][MR][NR];
    int64_t groups = (end - begin + NR - 1) / NR;
    int64_t sharers = std::min<int64_t>(tiles, NR);
    Ahead<typename F::W> ahead = {FOLLOWS == ALL_ROWS ? BY_ROWS : IN_ORDER, (const typename F::W*)m.data + end * m.in,
                                  BLOCK_OUT * m.in, (int)(NR * tile / sharers), (int)(NR * (tile + 1) / sharers)};
    for (int64_t k = 0; k < m.in; k += chunk) {
        int64_t stop = std::min(k + chunk, m.in);
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = begin + g * NR, count = std::min<int64_t>(NR, end - first);
            const typename F::W* w[NR];
            point<F, NR>(m, first, count, w);
            // One by one: copied as a whole they would stay in memory, and not come to registers.
            Vec sums[MR][NR];
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < NR; j++) sums[i][j] = k > 0 ? waiting[g][i][j] : Vec{};
            add_columns<F, MR, NR>(w, x, k, stop, ahead, sums);
            ahead.from += (stop - k) * NR;
            if (stop == m.in) finish<MR, NR>(sums, m, first, count, y, y_stride, add);
            else
                for (int i = 0; i < MR; i++)
                    for (int j = 0; j < NR; j++) waiting[g][i][j] = sums[i][j];
        }
    }
}

// Call `body` with the number of a tile's rows as a constant.
template <int MR = 1, class Body>
INLINE void with_rows(int64_t rows, Body body) {
    if constexpr (MR <= FEW_ROWS) {
        if (rows == MR) body(std::integral_constant<int, MR>());
        else with_rows<MR + 1>(rows, body);
    }
}

// Outputs [begin, end) for all rows: y[row, out] (+)= sum.
template <class F>
void linear_range(const Matrix& m, const Operand& x, float* y, int64_t y_stride, int64_t begin,
                  int64_t end, bool add) {
    const Tiling& tiling = x.tiling;
    if (tiling.rows <= STREAM_ROWS) {
        with_rows(tiling.rows, [&](auto rows) {
            constexpr int MR = rows, NR = outputs_of(MR, F::PARTS);
            if constexpr (MR <= STREAM_ROWS)
                stream_tile<F, MR, NR>(m, x.tile<typename F::X>(0), y, y_stride, begin, end, add);
        });
        return;
    }
    for (int64_t out = begin; out < end; out += BLOCK_OUT) {
        int64_t out_end = std::min(out + BLOCK_OUT, end);
        for (int64_t tile = 0; tile < tiling.tiles; tile++) {
            int64_t first = tiling.first(tile);
            const typename F::X* from = x.tile<typename F::X>(tile);
            float* to = y + first * y_stride;
            bool is_larger = tile < tiling.larger;
            // All tiles have the groups of the largest, since they share the fetching of the next block.
            with_rows(tiling.size + is_larger, [&](auto rows) {
                constexpr int MR = rows, NR = outputs_of(MR, F::PARTS);
                constexpr int OF_LARGER = outputs_of(std::min(MR + 1, FEW_ROWS), F::PARTS);
                if (is_larger || tiling.larger == 0)
                    block_tile<F, MR, NR>(m, from, to, y_stride, out, out_end, add, tile, tiling.tiles);
                else
                    block_tile<F, MR, OF_LARGER>(m, from, to, y_stride, out, out_end, add, tile, tiling.tiles);
            });
        }
    }
}

// The same for a weight of any format; in linear.cpp, where alone the loops above are compiled.
void linear_part(const Matrix& m, const Operand& x, float* y, int64_t y_stride, int64_t begin, int64_t end,
                 bool add);

}  // namespace folospec
