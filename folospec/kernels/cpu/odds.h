// A row of logits, what is asked of it, and the odds of its tokens. The oracle of all that is in this
// file and in filters.h is `process` of sampling/pipeline.py.
#pragma once

#include <limits>
#include <vector>

#include "vec.h"

namespace folospec {

// What the rows of one sequence are drawn with; packed by kernels/native_sampling.py.
struct Law {
    uint64_t seed;
    uint64_t sample_index;
    double temperature;  // 0: greedy
    double top_p;        // 1: all
    double log_min_p;    // -inf: all
    int64_t top_k;       // 0: all

    bool filters() const { return top_k > 0 || top_p < 1.0 || log_min_p > -HUGE_VAL; }
};

constexpr int64_t NO_TOKEN = -1;

INLINE double fused(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x <= 0 to about one unit in the last place; 0 below -64, where every weight is 0.
INLINE double exp_of_negative(double x) {
    double clamped = x > -64.0 ? x : -64.0;
    double shifted = fused(clamped, 0x1.71547652b82fep0, 0x1.8p52);  // its low bits are an integer
    double n = shifted - 0x1.8p52;
    double r = fused(n, -0x1.62e42fee00000p-1, clamped);  // log 2 in two parts, the first times n exact
    r = fused(n, -0x1.a39ef35793c76p-33, r);
    double y = 0x1.6124613a86d09p-33;  // 1 / 13!, and on to 1 / 2!: |r| is at most log(2) / 2
    y = fused(y, r, 0x1.1eed8eff8d898p-29);
    y = fused(y, r, 0x1.ae64567f544e4p-26);
    y = fused(y, r, 0x1.27e4fb7789f5cp-22);
    y = fused(y, r, 0x1.71de3a556c734p-19);
    y = fused(y, r, 0x1.a01a01a01a01ap-16);
    y = fused(y, r, 0x1.a01a01a01a01ap-13);
    y = fused(y, r, 0x1.6c16c16c16c17p-10);
    y = fused(y, r, 0x1.1111111111111p-7);
    y = fused(y, r, 0x1.5555555555555p-5);
    y = fused(y, r, 0x1.5555555555555p-3);
    y = fused(y, r, 0.5);
    y = fused(y * r, r, r) + 1.0;
    double power = as<double>((as<uint64_t>(shifted) + 1023) << 52);
    return x > -64.0 ? y * power : 0.0;
}

// To the nearest integer, ties to even. From 2^52 on there are only integers.
INLINE double rounded(double x) { return x < 0x1p52 ? (x + 0x1p52) - 0x1p52 : x; }

// A row of logits and what follows from its temperature.
struct Row {
    const float* logits;
    int64_t size;
    double peak, temperature;
    double one;     // the weight of odds 1: the sum of a row fits 62 bits
    double* odds;   // [size]
    int64_t total;  // the sum of the weights

    double scaled(int64_t id) const { return ((double)logits[id] - peak) / temperature; }
    int64_t weight(int64_t id) const { return (int64_t)rounded(odds[id] * one); }
    double log_total() const { return std::log((double)total / one); }
};

// A thread's own memory, as large as its largest row so far.
struct RowMemory {
    std::vector<double> odds;
    std::vector<uint64_t> order;  // see `order_key`
    std::vector<int64_t> same, below;  // see `walk_tree`
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
    if ((int64_t)memory.odds.size() < size) memory.odds.resize(size);
    double one = std::ldexp(1.0, 62 - (64 - __builtin_clzll((uint64_t)size)));
    Row row = {logits, size, peak, temperature, one, memory.odds.data(), 0};
    int64_t total = 0;
    for (int64_t id = 0; id < size; id++) {
        row.odds[id] = exp_of_negative(row.scaled(id));
        total += row.weight(id);
    }
    row.total = total;
    return row;
}

}  // namespace folospec
