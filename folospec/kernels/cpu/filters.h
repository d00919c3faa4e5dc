// top_k, top_p and min_p. Each keeps a prefix of one order (logit falling, then id rising), which is
// known by its last token; that one is found without sorting the row.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "odds.h"

namespace folospec {

// Ascending in these is descending in logits, of equals ascending in ids. -0 and 0 are equals.
INLINE uint64_t order_key(float logit, uint32_t id) {
    uint32_t bits = as<uint32_t>(logit + 0.0f);
    uint32_t falling = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return (uint64_t)falling << 32 | id;
}

// What the filters keep: the order up to token `last`, with logit `least`, and nothing below `floor`.
struct Kept {
    float least = -HUGE_VALF;
    int64_t last = std::numeric_limits<int64_t>::max();
    double floor = -HUGE_VAL;

    void end_at(const Row& row, uint64_t key) {
        last = (uint32_t)key;
        least = row.logits[last];
    }

    // Takes the odds of all others away.
    void apply(Row& row) const {
        if (floor > -HUGE_VAL)
            for (int64_t id = 0; id < row.size; id++)
                row.odds[id] = row.scaled(id) >= floor ? row.odds[id] : 0.0;
        int64_t total = 0;
        for (int64_t id = 0; id < row.size; id++) {
            bool in = (row.logits[id] > least) | ((row.logits[id] == least) & (id <= last));
            row.odds[id] = in ? row.odds[id] : 0.0;
            total += row.weight(id);
        }
        row.total = total;
    }
};

// Puts the keys of the tokens for which `wanted` holds into `order`.
template <class Wanted>
static void gather(const Row& row, std::vector<uint64_t>& order, Wanted wanted) {
    order.clear();
    constexpr int64_t BLOCK = 32;
    for (int64_t i = 0; i < row.size; i += BLOCK) {
        int64_t end = std::min(i + BLOCK, row.size);
        int any = 0;
        for (int64_t id = i; id < end; id++) any |= wanted(row.odds[id]);
        if (!any) continue;
        for (int64_t id = i; id < end; id++)
            if (wanted(row.odds[id])) order.push_back(order_key(row.logits[id], (uint32_t)id));
    }
}

// The key of the k-th token in order, 1 <= k <= size.
static uint64_t key_of_count(const Row& row, int64_t k, std::vector<uint64_t>& order) {
    // At least k tokens have the odds of the k-th largest of the maxima of 256 parts of the row.
    constexpr int64_t PARTS = 256;
    double maxima[PARTS] = {};
    if (k <= PARTS) {
        int64_t i = 0;
        for (; i + PARTS <= row.size; i += PARTS)
            for (int64_t j = 0; j < PARTS; j++) {
                double odds = row.odds[i + j];
                maxima[j] = odds > maxima[j] ? odds : maxima[j];
            }
        std::nth_element(maxima, maxima + k - 1, maxima + PARTS, std::greater<double>());
    }
    double least = k <= PARTS ? maxima[k - 1] : 0.0;
    gather(row, order, [=](double odds) { return odds >= least; });
    std::nth_element(order.begin(), order.begin() + k - 1, order.end());
    return order[k - 1];
}

// Tokens of about the same odds: 32 buckets for each factor of 2, and the last one for all the rest.
constexpr int BUCKETS = 1024;

INLINE int bucket_of(double odds) {
    uint64_t below_one = (as<uint64_t>(1.0) - as<uint64_t>(odds)) >> 47;
    return below_one < BUCKETS - 1 ? (int)below_one : BUCKETS - 1;
}

// The key of the last token of the shortest prefix of the order whose weight reaches `bound`.
static uint64_t key_of_mass(const Row& row, double bound, std::vector<uint64_t>& order) {
    int64_t mass[BUCKETS] = {};
    constexpr int64_t BLOCK = 64;
    for (int64_t i = 0; i < row.size; i += BLOCK) {
        int64_t count = std::min(BLOCK, row.size - i), weights[BLOCK];
        int buckets[BLOCK];
        for (int64_t j = 0; j < count; j++) weights[j] = row.weight(i + j);
        for (int64_t j = 0; j < count; j++) buckets[j] = bucket_of(row.odds[i + j]);
        for (int64_t j = 0; j < count; j++) mass[buckets[j]] += weights[j];
    }
    int64_t before = 0;
    int bucket = 0;
    while ((double)(before + mass[bucket]) < bound) before += mass[bucket++];
    gather(row, order, [=](double odds) { return bucket_of(odds) == bucket; });
    std::sort(order.begin(), order.end());
    size_t place = 0;
    while ((double)(before += row.weight((uint32_t)order[place])) < bound) place++;
    return order[place];
}

static Kept filter(Row& row, const SamplingParams& params, std::vector<uint64_t>& order) {
    Kept kept;
    if (params.top_k > 0 && params.top_k < row.size) {
        kept.end_at(row, key_of_count(row, params.top_k, order));
        kept.apply(row);
    }
    if (params.top_p < 1.0) kept.end_at(row, key_of_mass(row, params.top_p * (double)row.total, order));
    kept.floor = params.log_min_p;
    kept.apply(row);
    return kept;
}

}  // namespace folospec
