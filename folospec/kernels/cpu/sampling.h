// From logits to tokens: the arg-max, the filtered distribution, and the race of the keyed noise.
//
//     logits --> peak --> scaled = (logit - peak) / temperature --> odds = exp(scaled), in 0 .. 1
//                                                                      |
//                top_k, top_p, min_p: a prefix of the order            |
//                (logit falling, then id rising), found unsorted       v
//                                 |                         weight = round(odds * 2^bits)
//                                 v                                    |
//     log_prob = scaled - log(sum of the kept weights / 2^bits)  <-----'
//     token    = the largest log_prob + gumbel(key, id), of equals the lowest id
//
// and from tokens to an accepted path, drawing only at rows that the path comes to.
//
// A row is done by one thread, from its own numbers alone, and sums are sums of integers, which have
// no order. The oracle is `process` of sampling/pipeline.py with `draw_target` of sampling/sampler.py.
#pragma once

#include <algorithm>
#include <vector>

#include "filters.h"
#include "team.h"

namespace folospec {

// ---- noise: see sampling/noise.py ---------------------------------------------------------------

INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The key of the target's token at a position.
INLINE uint64_t target_key(const SamplingParams& params, int64_t position) {
    const uint64_t parts[] = {params.seed, params.sample_index, (uint64_t)position, 0};
    uint64_t state = 0;
    for (uint64_t part : parts) state = mix64((state ^ part) + 0x9E3779B97F4A7C15u);
    return state;
}

INLINE uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

INLINE double uniform(uint64_t key, uint32_t id) {
    return (to_double(mix32(mix32(id ^ (uint32_t)key) ^ (uint32_t)(key >> 32))) + 0.5) * 0x1p-32;
}

INLINE float gumbel(double u) { return (float)-std::log(-std::log1p(-u)); }

// ---- the race -----------------------------------------------------------------------------------

// Keeps the largest score, and knows what can still beat it without a logarithm:
//
//     score = log(odds) - log_total - log(E),   E = -log1p(-u) >= u,   so that only
//     u <= odds * exp(-log_total - best + margin) can win.
//
// Scores are sums of float32 numbers. With |gumbel| < 23, rounding moves a score that reaches `best` by
// at most 2^-24 * (2 |best| + 69); the margin is more.
struct Race {
    const Row& row;
    uint64_t key;
    double log_total;
    float best = -HUGE_VALF;
    int64_t winner = NO_TOKEN;
    double limit = HUGE_VAL;

    void enter(int64_t id, double u) {
        float score = (float)(row.scaled(id) - log_total) + gumbel(u);
        if (score < best || (score == best && id > winner)) return;
        best = score;
        winner = id;
        limit = std::exp(-log_total - best + 0x1p-24 * (2.0 * std::fabs(best) + 80.0));
    }

    void try_one(int64_t id) {
        double u = uniform(key, (uint32_t)id);
        if (u <= row.odds[id] * limit) enter(id, u);
    }

    void try_all() {
        constexpr int64_t BLOCK = 64;
        int64_t i = 0;
        for (; i + BLOCK <= row.size; i += BLOCK) {
            const double* odds = row.odds + i;
            double now = limit;
            int any = 0;
            for (int64_t j = 0; j < BLOCK; j++) any |= uniform(key, (uint32_t)(i + j)) <= odds[j] * now;
            if (any)
                for (int64_t j = 0; j < BLOCK; j++) try_one(i + j);
        }
        for (; i < row.size; i++) try_one(i);
    }
};

// ---- rows ---------------------------------------------------------------------------------------

// The token of one row, NO_TOKEN where none is possible; `peak` says why: -inf, or NaN or +inf.
static int64_t draw_row(const float* logits, int64_t size, const SamplingParams& params, int64_t position, float* peak,
                        RowMemory& memory) {
    *peak = row_peak(logits, size);
    if (!std::isfinite(*peak)) return NO_TOKEN;
    int64_t top = first_equal(logits, size, *peak);
    if (params.temperature == 0.0) return top;
    Row row = make_row(logits, size, *peak, params.temperature, memory);
    if (params.filters()) filter(row, params, memory.order);
    uint64_t key = target_key(params, position);
    Race race = {row, key, row.log_total()};
    race.enter(top, uniform(key, (uint32_t)top));
    race.try_all();
    return race.winner;
}

// The log-probabilities that `draw_row` draws from; all -inf where no token is possible.
static void log_probs_row(const float* logits, int64_t size, const SamplingParams& params, float* peak, float* out,
                          RowMemory& memory) {
    *peak = row_peak(logits, size);
    if (!std::isfinite(*peak) || params.temperature == 0.0) {
        std::fill(out, out + size, -HUGE_VALF);
        if (std::isfinite(*peak)) out[first_equal(logits, size, *peak)] = 0.0f;
        return;
    }
    Row row = make_row(logits, size, *peak, params.temperature, memory);
    Kept kept;
    if (params.filters()) kept = filter(row, params, memory.order);
    double log_total = row.log_total();
    for (int64_t id = 0; id < size; id++) {
        bool in = (logits[id] > kept.least) | ((logits[id] == kept.least) & (id <= kept.last));
        double scaled = row.scaled(id);
        out[id] = in & (scaled >= kept.floor) ? (float)(scaled - log_total) : -HUGE_VALF;
    }
}

// ---- trees --------------------------------------------------------------------------------------

// A sequence's rows, root first and node i behind it as row i + 1. Its nodes' tokens are in `nodes` from
// `begin` on, -1 for one that is not to be accepted, and their parents behind them.
struct Tree {
    int64_t root_row;
    int64_t position;  // of the token after the root
    int64_t begin;
    int64_t size;
};

struct Verified {
    int64_t token;   // after the path; NO_TOKEN where none is possible
    int64_t length;  // of the path
    double peak;     // the largest logit where the path ends
};

// Nodes with the same tokens from the root on are one: `same` holds them, and the path is its first's.
static Verified verify_tree(const float* logits, int64_t size, const SamplingParams& params, const Tree& tree,
                            const int64_t* nodes, int64_t* paths, RowMemory& memory) {
    const int64_t *tokens = nodes + tree.begin, *parents = tokens + tree.size;
    std::vector<int64_t>&same = memory.same, &below = memory.below;
    same.assign(1, -1);
    for (int64_t length = 0;; length++) {
        const float* row = logits + (tree.root_row + 1 + same[0]) * size;
        float peak;
        int64_t token = draw_row(row, size, params, tree.position + length, &peak, memory);
        below.clear();
        if (token != NO_TOKEN)
            for (int64_t node : same)
                for (int64_t child = node + 1; child < tree.size; child++)
                    if (parents[child] == node && tokens[child] == token) below.push_back(child);
        if (below.empty()) {
            for (int64_t node = same[0], place = length; place > 0; node = parents[node])
                paths[tree.begin + --place] = node;
            return {token, length, peak};
        }
        same.swap(below);
    }
}

INLINE RowMemory& memory_of_thread() {
    static thread_local RowMemory memory;
    return memory;
}

}  // namespace folospec

#define EXPORT_SAMPLING extern "C" __attribute__((visibility("default")))

EXPORT_SAMPLING void folospec_sampling_sizes(int64_t* sizes) {
    sizes[0] = sizeof(folospec::SamplingParams);
    sizes[1] = sizeof(folospec::Tree);
    sizes[2] = sizeof(folospec::Verified);
}

// Draw the target's tokens of `count` sequences and verify their trees: accept a child that has the drawn
// token, and draw at it the next. See `verify_coupled` of spec/verify.py.
EXPORT_SAMPLING void folospec_verify(const float* logits, int64_t size, const folospec::SamplingParams* all_params,
                                     const folospec::Tree* trees, const int64_t* nodes, int64_t count,
                                     folospec::Verified* verified, int64_t* paths, int64_t threads) {
    using namespace folospec;
    share_out(threads, count, [&](int64_t i) {
        verified[i] = verify_tree(logits, size, all_params[i], trees[i], nodes, paths, memory_of_thread());
    });
}

// Log-probabilities [count, size] of the rows of logits [count, size], row i with distributions[params_of[i]].
EXPORT_SAMPLING void folospec_log_probs(const float* logits, int64_t size, const folospec::SamplingParams* all_params,
                                        const int64_t* params_of, int64_t count, float* out, float* peaks,
                                        int64_t threads) {
    using namespace folospec;
    share_out(threads, count, [&](int64_t i) {
        log_probs_row(logits + i * size, size, all_params[params_of[i]], peaks + i, out + i * size,
                      memory_of_thread());
    });
}
