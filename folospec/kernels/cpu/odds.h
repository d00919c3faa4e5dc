// A row of logits, what is asked of it, and the odds of its tokens. The oracle of all that is in this
// file and in filters.h is `process` of sampling/pipeline.py.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vec.h"

namespace folospec {

// What the rows of one sequence are drawn with; packed by kernels/native_sampling.py.
struct SamplingParams {
    uint64_t seed;
    uint64_t sample_index;
    double temperature;  // 0: greedy
    double top_p;        // 1: all
    double log_min_p;    // -inf: all
    int64_t top_k;       // 0: all

    bool filters() const { return top_k > 0 || top_p < 1.0 || log_min_p > -HUGE_VAL; }
};

constexpr int64_t NO_TOKEN = -1;

INLINE DoubleVec splat_double(double value) { return as<DoubleVec>(LongVec{} + as<int64_t>(value)); }

// e^x for x <= 0 to about one unit in the last place; 0 below -64, where every weight is 0. In vectors, since
// compilers do not find one for the comparisons in it.
INLINE DoubleVec exp_of_negative(DoubleVec x) {
    LongVec is_tiny = x <= splat_double(-64.0);
    DoubleVec clamped = is_tiny ? splat_double(-64.0) : x;
    DoubleVec shifted = fma(clamped, splat_double(0x1.71547652b82fep0), splat_double(0x1.8p52));
    DoubleVec n = shifted - 0x1.8p52;  // the low bits of `shifted` are this integer
    DoubleVec r = fma(n, splat_double(-0x1.62e42fee00000p-1), clamped);  // log 2 in two parts, the first
    r = fma(n, splat_double(-0x1.a39ef35793c76p-33), r);                 // times n exact
    const double series[] = {0x1.1eed8eff8d898p-29, 0x1.ae64567f544e4p-26, 0x1.27e4fb7789f5cp-22,
                             0x1.71de3a556c734p-19, 0x1.a01a01a01a01ap-16, 0x1.a01a01a01a01ap-13,
                             0x1.6c16c16c16c17p-10, 0x1.1111111111111p-7, 0x1.5555555555555p-5,
                             0x1.5555555555555p-3, 0.5};
    DoubleVec y = splat_double(0x1.6124613a86d09p-33);  // 1 / 13!, and on to 1 / 2!: |r| is at most log(2) / 2
    for (double factor : series) y = fma(y, r, splat_double(factor));
    y = fma(y * r, r, r) + 1.0;
    LongVec power = (as<LongVec>(shifted) + 1023) << 52;
    return as<DoubleVec>(as<LongVec>(y * as<DoubleVec>(power)) & ~is_tiny);
}

// Conversions that every instruction set has for vectors: the low bits of 2^52 + x are an integer.
INLINE int64_t round_to_integer(double x) {  // 0 <= x <= 2^52; ties to even
    return as<int64_t>(x + 0x1p52) - as<int64_t>(0x1p52);
}
INLINE double to_double(uint32_t x) { return as<double>(as<uint64_t>(0x1p52) | x) - 0x1p52; }

// A row of logits and what follows from its temperature.
struct Row {
    const float* logits;
    int64_t size;
    double peak, temperature;
    double one;     // the weight of odds 1, at most 2^52; the sum of a row fits 62 bits
    double* odds;   // [size]
    int64_t total;  // the sum of the weights

    double scaled(int64_t id) const { return ((double)logits[id] - peak) / temperature; }
    int64_t weight(int64_t id) const { return round_to_integer(odds[id] * one); }
    double log_total() const { return std::log((double)total / one); }
};

// A thread's own memory, as large as its largest row so far.
struct RowMemory {
    std::vector<double> odds;
    std::vector<uint64_t> order;  // see `order_key`
    std::vector<int64_t> same, below;  // see `verify_tree`
};

// The largest value; NaN if there is one.
static float row_peak(const float* x, int64_t size) {
    Vec best = splat(-HUGE_VALF);
    IntVec is_nan = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Vec v = load(x + i);
        best = max(v, best);
        is_nan |= v != v;
    }
    float peak = largest(best);
    bool found = false;
    for (int lane = 0; lane < LANES; lane++) found |= is_nan[lane] != 0;
    for (; i < size; i++) {
        peak = x[i] > peak ? x[i] : peak;
        found |= x[i] != x[i];
    }
    return found ? std::numeric_limits<float>::quiet_NaN() : peak;
}

// The lowest id of a value that is there.
static int64_t first_equal(const float* x, int64_t size, float value) {
    constexpr int64_t BLOCK = 64;
    int64_t i = 0;
    for (int any = 0; i + BLOCK <= size; i += BLOCK) {
        for (int64_t j = 0; j < BLOCK; j++) any |= x[i + j] == value;
        if (any) break;
    }
    while (x[i] != value) i++;
    return i;
}

static Row make_row(const float* logits, int64_t size, float peak, double temperature, RowMemory& memory) {
    int64_t room = (size + DOUBLES - 1) / DOUBLES * DOUBLES;
    if ((int64_t)memory.odds.size() < room) memory.odds.resize(room);
    double one = std::ldexp(1.0, std::min(52, 62 - (64 - __builtin_clzll((uint64_t)size))));
    Row row = {logits, size, peak, temperature, one, memory.odds.data(), 0};
    LongVec total = {};
    auto weigh = [&](int64_t i, const float* from) {
        DoubleVec odds = exp_of_negative((load_doubles(from) - (double)peak) / temperature);
        total += as<LongVec>(odds * one + 0x1p52) - as<int64_t>(0x1p52);  // see `round_to_integer`
        std::memcpy(row.odds + i, &odds, sizeof odds);
    };
    int64_t i = 0;
    for (; i + DOUBLES <= size; i += DOUBLES) weigh(i, logits + i);
    if (i < size) {
        float last[DOUBLES];
        std::fill(last, last + DOUBLES, -HUGE_VALF);
        std::memcpy(last, logits + i, (size - i) * sizeof(float));
        weigh(i, last);
    }
    for (int lane = 0; lane < DOUBLES; lane++) row.total += total[lane];
    return row;
}

}  // namespace folospec
