// The children of draft nodes: from rows of logits to the best tokens and the confidence in each.
//
//     score  = scaled logit, plus the noise that will draw the target's token where it is coupled
//     chance = exp(scale * (score - best)) / its sum over the vocabulary
//
//     rough scores of all, sixteen at a time  -->  their k best, and what may be as good  -->  exact
//
// A row is done by one thread, from its own numbers alone. The torch form, and what it is good for, is
// spec/trees/children.py: its scores agree with these to a few units of float32, so that near ties may differ.
#pragma once

#include <algorithm>
#include <vector>

#include "sampling.h"
#include "vec.h"

namespace folospec {

constexpr int64_t NO_NOISE = -1;        // instead of a position
constexpr float ROUGH_MARGIN = 1e-3f;   // more than two rough scores can be off, near the best

struct Wanted {
    int64_t params, position, count;  // position of the token that is drawn, or NO_NOISE
    double scale;
};

struct Scored {
    float score;
    int64_t id;
    bool operator<(const Scored& other) const {
        return score > other.score || (score == other.score && id < other.id);
    }
};

// log x of a normal x > 0, to about 1e-7 + 1e-7 |log x|.
INLINE Vec rough_log(Vec x) {
    IntVec bits = as<IntVec>(x);
    IntVec exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in sqrt(1/2) .. sqrt(2)
    Vec mantissa = as<Vec>(as<UintVec>(bits) - (as<UintVec>(exponent) << 23));
    Vec f = (mantissa - 1.0f) / (mantissa + 1.0f), square = f * f;
    Vec series = fma(square, fma(square, fma(square, splat(2 / 7.0f), splat(0.4f)), splat(2 / 3.0f)), splat(2.0f));
    return fma(__builtin_convertvector(exponent, Vec), splat(0.693147181f), f * series);
}

INLINE UintVec mix32(UintVec x) {
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

// Gumbel noise of sixteen ids, off by 1e-4 at most.
INLINE Vec rough_gumbel(uint64_t key, UintVec ids) {
    UintVec bits = mix32(mix32(ids ^ (uint32_t)key) ^ (uint32_t)(key >> 32));
    Vec u = (__builtin_convertvector(bits, Vec) + 0.5f) * 0x1p-32f;
    Vec rest = (__builtin_convertvector(~bits, Vec) + 0.5f) * 0x1p-32f;  // 1 - u, where u is almost 1
    Vec small = fma(u * u, fma(u, splat(1 / 3.0f), splat(0.5f)), u);
    return -rough_log(u < splat(0x1p-8f) ? small : -rough_log(rest));
}

// The k largest of what was offered; `least` is the last of them once there are k.
class Best {
public:
    explicit Best(int64_t k, std::vector<float>& room) : k(k), kept(room) { kept.clear(); }
    float least() const { return (int64_t)kept.size() < k ? -HUGE_VALF : kept.front(); }
    void offer(float score) {
        if (!(score > least())) return;
        if ((int64_t)kept.size() == k) {
            std::pop_heap(kept.begin(), kept.end(), std::greater<float>());
            kept.pop_back();
        }
        kept.push_back(score);
        std::push_heap(kept.begin(), kept.end(), std::greater<float>());
    }

private:
    const int64_t k;
    std::vector<float>& kept;
};

// What a thread has room for.
struct ChildRoom {
    RowMemory memory;
    std::vector<float> log_probs, scores, best;
    std::vector<Scored> found;
};

class ChildRow {
public:
    ChildRow(const float* logits, int64_t size, const SamplingParams& params, const Wanted& wanted, ChildRoom& room)
        : logits(logits), size(size), wanted(wanted), room(room), key(target_key(params, wanted.position)),
          temperature(params.temperature > 0.0 ? params.temperature : 1.0) {
        if (params.temperature > 0.0 && params.filters()) {
            room.log_probs.resize(size);
            log_probs_row(logits, size, params, &peak, room.log_probs.data(), room.memory);
            this->logits = room.log_probs.data();
            temperature = 1.0;
        }
        peak = row_peak(this->logits, size);
    }

    // Returns how many there are: fewer than wanted where no more tokens are possible.
    int64_t draw(int64_t* tokens, float* chances) {
        if (!std::isfinite(peak) || wanted.count <= 0) return 0;
        score_roughly();
        float top = collect();
        float sum = total(top);
        int64_t count = std::min<int64_t>(wanted.count, room.found.size());
        std::partial_sort(room.found.begin(), room.found.begin() + count, room.found.end());
        for (int64_t i = 0; i < count; i++) {
            tokens[i] = room.found[i].id;
            double above = wanted.scale * ((double)room.found[i].score - top);
            chances[i] = std::min(1.0f, (float)std::exp(above) / sum);
        }
        return count;
    }

private:
    const float* logits;
    const int64_t size;
    const Wanted& wanted;
    ChildRoom& room;
    const uint64_t key;
    double temperature;
    float peak;

    bool is_noisy() const { return wanted.position != NO_NOISE; }

    float exact(int64_t id) const {
        float scaled = (float)(((double)logits[id] - peak) / temperature);
        return is_noisy() ? scaled + gumbel(uniform(key, (uint32_t)id)) : scaled;
    }

    void score_roughly() {
        const IntVec lanes = lane_numbers();
        room.scores.resize((size + LANES - 1) / LANES * LANES);
        float factor = (float)(1.0 / temperature);
        for (int64_t i = 0; i < size; i += LANES) {
            int count = std::min<int64_t>(LANES, size - i);
            Vec scores = (count == LANES ? load(logits + i) : load_part(logits + i, count)) - peak;
            scores = scores * factor;
            if (is_noisy()) scores = scores + rough_gumbel(key, as<UintVec>(lanes + (int32_t)i));
            scores = lanes < count ? scores : splat(-HUGE_VALF);
            store(room.scores.data() + i, scores);
        }
    }

    // Finds what may be among the best, scores it exactly, and returns the best rough score.
    float collect() {
        Best best(wanted.count, room.best);
        const std::vector<float>& scores = room.scores;
        float top = -HUGE_VALF;
        each_above(
            [&] { return best.least(); },
            [&](int64_t id) {
                best.offer(scores[id]);
                top = std::max(top, scores[id]);
            });
        float floor = best.least() - ROUGH_MARGIN;
        room.found.clear();
        each_above([&] { return floor; }, [&](int64_t id) { room.found.push_back({exact(id), id}); });
        return top;
    }

    template <class Floor, class Take>
    void each_above(Floor floor, Take take) {
        for (size_t i = 0; i < room.scores.size(); i += LANES) {
            IntVec above = load(room.scores.data() + i) > splat(floor());
            if (none(above)) continue;
            for (int lane = 0; lane < LANES; lane++)
                if (above[lane]) take(i + lane);
        }
    }

    static bool none(IntVec lanes) {
        int64_t words[LANES / 2], any = 0;
        std::memcpy(words, &lanes, sizeof words);
        for (int64_t word : words) any |= word;
        return any == 0;
    }

    float total(float top) const {
        Vec sums = {};
        for (size_t i = 0; i < room.scores.size(); i += LANES)
            sums = sums + exp((load(room.scores.data() + i) - top) * (float)wanted.scale);
        return sum(sums);
    }
};

}  // namespace folospec

extern "C" __attribute__((visibility("default"))) int64_t folospec_sizeof_wanted() {
    return sizeof(folospec::Wanted);
}

// For every row of logits [rows, size]: found[row] tokens and chances, at [row, 0], [row, 1], ... of
// arrays [rows, most].
extern "C" __attribute__((visibility("default"))) void folospec_children(
    const float* logits, int64_t size, const folospec::SamplingParams* all_params, const folospec::Wanted* wanted, int64_t rows,
    int64_t most, int64_t* tokens, float* chances, int64_t* found, int32_t threads) {
    using namespace folospec;
    share_out(threads, rows, [&](int64_t row) {
        static thread_local ChildRoom room;
        ChildRow drawn(logits + row * size, size, all_params[wanted[row].params], wanted[row], room);
        found[row] = drawn.draw(tokens + row * most, chances + row * most);
    });
}
