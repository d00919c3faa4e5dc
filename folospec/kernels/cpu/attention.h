// Ragged attention over paged KV, in logical order.
//
// A row's keys are numbered 0 .. num_keys - 1 as plain decoding would meet them: the context by
// position, then its ancestors among the step's own rows by depth, itself last. Where they lie is
// another matter: the context in the pages of the block table, the rest at the slots of its tail.
//
//     logical   0 1 2 3 4 5 6 7 | 8 9 ...        tiles of TILE keys, cut by logical number
//     context   page 7 | page 2 |                found through the block table
//     tail                        root, a, a.b   slots of this row's own path
//
// Softmax runs tile by tile, with a running maximum. A row meets the same tiles with the same keys
// whether it is decoded alone, verified as a node of a tree or computed in the middle of a chunk, and
// no sum runs over anything else: its bits are the same. Rows and query heads that read the same keys
// share the loading of a tile; they share no arithmetic.
#pragma once

#include "rowwise.h"

namespace folospec {

constexpr int TILE = 64;
constexpr int MAX_HEAD = 256;
constexpr int MAX_QUERIES = 64;  // of one unit: rows times query heads

struct AttentionStep {
    int64_t rows, heads, kv_heads, head_size, block_size, table_width;
    const int32_t* row_seq;       // [rows] sequence of each row
    const int32_t* num_keys;      // [rows] keys in logical order, the row itself included
    const int32_t* first_key;     // [rows] keys below are out of the window, or null: 0
    const int32_t* context_lens;  // [seqs] keys found through the block table
    const int32_t* block_table;   // [seqs, table_width]
    const int64_t* tail_start;    // [rows] where the row's tail begins in tail_slots
    const int64_t* tail_slots;
    const int32_t* group_start;   // [groups + 1] rows of one sequence that run together
    int64_t groups;
    double scale, softcap;  // softcap 0: none
    int64_t kv_format;      // FLOAT32 or BFLOAT16
};

struct Pages {
    void* key;
    void* value;
};

// What one query has so far: maximum, sum of weights, weighted sum of values.
struct Running {
    float maximum, total;
    float values[MAX_HEAD] __attribute__((aligned(64)));
};

struct Unit {
    Running running[MAX_QUERIES];
    float scores[MAX_QUERIES][TILE] __attribute__((aligned(64)));
    float keys[MAX_HEAD * TILE] __attribute__((aligned(64)));  // transposed: one dimension, TILE keys
    float queries[MAX_QUERIES][MAX_HEAD] __attribute__((aligned(64)));
    int64_t places[TILE], next_places[TILE];
    int32_t first[MAX_QUERIES], last[MAX_QUERIES];  // the keys of the tile that each query sees
};

// A word of a key: a dimension of float32, a pair of bfloat16. The score's sum goes word by word, and in a
// word part by part.
struct Float32KV {
    typedef float T;
    static constexpr int PER_WORD = 1, PARTS = 1;
    template <int PART>
    INLINE Vec score(const float* query, Vec keys, Vec sums) { return fma(splat(*query), keys, sums); }
    INLINE void put_query(const float* from, float* to, int64_t size) { copy_converted(from, to, size); }
};

#if defined(FOLOSPEC_BF16_DOT)
struct BFloat16KV {
    typedef bfloat16 T;
    static constexpr int PER_WORD = 2, PARTS = 1;
    template <int PART>
    INLINE Vec score(const float* query, Vec keys, Vec sums) {
        return dot_pairs(as<UintVec>(splat(*query)), as<UintVec>(keys), sums);
    }
    INLINE void put_query(const float* from, float* to, int64_t size) {
        copy_converted(from, (bfloat16*)to, size);
    }
};
#else
struct BFloat16KV {
    typedef bfloat16 T;
    static constexpr int PER_WORD = 2, PARTS = 2;
    template <int PART>
    INLINE Vec score(const float* query, Vec keys, Vec sums) {
        return fma(splat(query[PART]), widen_part<PART>(as<UintVec>(keys)), sums);
    }
    INLINE void put_query(const float* from, float* to, int64_t size) {
        each_vec(size, [&](int64_t i, int n) {
            store_up_to(to + i, as<Vec>(round_to_bfloat16(load_up_to(from + i, n))), n);
        });
    }
};
#endif

// Where the keys [begin, end) that `row` sees lie: runs within a page, then its tail. A place is the
// number of elements before the first of KV head 0.
INLINE void find_places(const AttentionStep& s, int64_t row, int64_t begin, int64_t end, int64_t* places) {
    int64_t seq = s.row_seq[row], context = s.context_lens[seq], key = begin;
    int64_t stride = s.kv_heads * s.head_size;
    const int32_t* table = s.block_table + seq * s.table_width;
    while (key < std::min(end, context)) {
        int64_t page = key / s.block_size, offset = key - page * s.block_size;
        int64_t stop = std::min({end, context, (page + 1) * s.block_size});
        int64_t place = (table[page] * s.block_size + offset) * stride;
        for (; key < stop; key++, place += stride) *places++ = place;
    }
    for (; key < end; key++) *places++ = s.tail_slots[s.tail_start[row] + key - context] * stride;
}

// Ask memory, up to the second level, for the keys or values of heads [first, end) at these places.
template <class T>
INLINE void fetch(const AttentionStep& s, const void* pages, int64_t first, int64_t end, const int64_t* places,
                  int64_t count) {
    int64_t bytes = (end - first) * s.head_size * sizeof(T);
    for (int64_t j = 0; j < count; j++) {
        const char* from = (const char*)((const T*)pages + places[j] + first * s.head_size);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
    }
}

// Transpose `count` keys of one head: word w of key j goes to keys[w * TILE + j].
template <class KV>
void load_keys(const AttentionStep& s, const Pages& pages, int64_t head, int count, Unit& u) {
    const typename KV::T* keys = (const typename KV::T*)pages.key + head * s.head_size;
    int64_t words = s.head_size / KV::PER_WORD;
    for (int j = 0; j < count; j += LANES)
        for (int64_t w = 0; w < words; w += LANES) {
            Vec block[LANES];
            for (int i = 0; i < LANES; i++)
                std::memcpy(&block[i], keys + u.places[std::min(j + i, count - 1)] + w * KV::PER_WORD,
                            sizeof(Vec));
            transpose(block);
            for (int i = 0; i < LANES; i++) store(u.keys + (w + i) * TILE + j, block[i]);
        }
}

template <class KV, int PART, int Q, int VECS>
INLINE void add_scores(const Unit& u, int first, int64_t word, int key, Vec sums[Q][VECS]) {
    if constexpr (PART < KV::PARTS) {
        for (int v = 0; v < VECS; v++) {
            Vec keys = load(u.keys + word * TILE + key + v * LANES);
            keep(keys);
            for (int q = 0; q < Q; q++)
                sums[q][v] = KV::template score<PART>(u.queries[first + q] + word * KV::PARTS, keys, sums[q][v]);
        }
        add_scores<KV, PART + 1, Q, VECS>(u, first, word, key, sums);
    }
}

// Scores of Q queries and a tile's keys, of so many keys at once that the sums stay in registers.
template <class KV, int Q>
void score_keys(const AttentionStep& s, int first, Unit& u) {
    constexpr int VECS = std::min(TILE / LANES, ATTENTION_SUMS / Q);
    int64_t words = s.head_size / KV::PER_WORD;
    for (int j = 0; j < TILE; j += VECS * LANES) {
        Vec sums[Q][VECS] = {};
        for (int64_t w = 0; w < words; w++) add_scores<KV, 0, Q, VECS>(u, first, w, j, sums);
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECS; v++) store(u.scores[first + q] + j + v * LANES, sums[q][v]);
    }
}

// Turn a query's scores into weights under the running maximum, and rescale what it has.
INLINE void weigh(const AttentionStep& s, int q, Unit& u) {
    constexpr int VECS = TILE / LANES;
    const IntVec lanes = lane_numbers();
    const Vec minus_infinity = splat(-INFINITY);
    Running& r = u.running[q];
    float* scores = u.scores[q];
    Vec weights[VECS], best = minus_infinity;
    for (int v = 0; v < VECS; v++) {
        Vec x = load(scores + v * LANES) * (float)s.scale;
        if (s.softcap > 0)
            for (int i = 0; i < LANES; i++) x[i] = std::tanh(x[i] / (float)s.softcap) * (float)s.softcap;
        IntVec key = lanes + v * LANES;
        IntVec seen = (key >= u.first[q]) & (key < u.last[q]);
        weights[v] = seen ? x : minus_infinity;
        best = max(best, weights[v]);
    }
    float maximum = std::max(r.maximum, largest(best));
    Vec total = {};
    for (int v = 0; v < VECS; v++) {
        weights[v] = exp(weights[v] - maximum);
        total = total + weights[v];
        store(scores + v * LANES, weights[v]);
    }
    float scale = r.maximum == maximum ? 1.0f : exp(splat(r.maximum - maximum))[0];
    r.maximum = maximum;
    r.total = r.total * scale + sum(total);
    if (scale != 1.0f)
        for (int64_t d = 0; d < s.head_size; d += LANES)
            store(r.values + d, load(r.values + d) * scale);
}

// Add keys [begin, end) of the tile to the weighted values of Q queries, one key after the other;
// VECS vectors of the head at once.
template <class KV, int Q, int VECS>
void add_values(const AttentionStep& s, const Pages& pages, int64_t head, int first, int begin, int end,
                Unit& u) {
    const typename KV::T* values = (const typename KV::T*)pages.value + head * s.head_size;
    for (int64_t d = 0; d < s.head_size; d += VECS * LANES) {
        Vec sums[Q][VECS];
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECS; v++) sums[q][v] = load(u.running[first + q].values + d + v * LANES);
        for (int j = begin; j < end; j++) {
            const typename KV::T* from = values + u.places[j] + d;
            for (int v = 0; v < VECS; v++) {
                Vec value = load(from + v * LANES);
                keep(value);
                for (int q = 0; q < Q; q++)
                    sums[q][v] = fma(splat(u.scores[first + q][j]), value, sums[q][v]);
            }
        }
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECS; v++) store(u.running[first + q].values + d + v * LANES, sums[q][v]);
    }
}

// As much of the head at once as registers hold sums for, and as divides it.
template <class KV, int Q, int VECS = ATTENTION_SUMS / Q>
INLINE void add_values_wide(const AttentionStep& s, const Pages& pages, int64_t head, int first, int begin,
                            int end, Unit& u) {
    constexpr int LEAST = 32 / LANES;
    if (begin >= end) return;
    if constexpr (VECS > LEAST)
        if (s.head_size % (VECS * LANES) != 0)
            return add_values_wide<KV, Q, VECS / 2>(s, pages, head, first, begin, end, u);
    add_values<KV, Q, VECS>(s, pages, head, first, begin, end, u);
}

template <class KV, int Q>
void attend_queries(const AttentionStep& s, const Pages& pages, int64_t head, int first, Unit& u) {
    score_keys<KV, Q>(s, first, u);
    int begin = 0, end = TILE;
    for (int q = first; q < first + Q; q++) {
        weigh(s, q, u);
        begin = std::max(begin, u.first[q]);
        end = std::min(end, u.last[q]);
    }
    // A key that only some of them see is added for those alone: not even zero times it for others.
    if (end < begin) end = begin;
    for (int q = first; q < first + Q; q++)
        add_values_wide<KV, 1>(s, pages, head, q, u.first[q], std::min(begin, u.last[q]), u);
    add_values_wide<KV, Q>(s, pages, head, first, begin, end, u);
    for (int q = first; q < first + Q; q++)
        add_values_wide<KV, 1>(s, pages, head, q, std::max(end, u.first[q]), u.last[q], u);
}

// Queries [first, end) meet one tile, whose places are known.
template <class KV>
void attend_tile(const AttentionStep& s, const Pages& pages, int64_t head, int count, int first, int end,
                 Unit& u) {
    load_keys<KV>(s, pages, head, count, u);
    int q = first;
    for (; q + 4 <= end; q += 4) attend_queries<KV, 4>(s, pages, head, q, u);
    for (; q + 2 <= end; q += 2) attend_queries<KV, 2>(s, pages, head, q, u);
    for (; q < end; q++) attend_queries<KV, 1>(s, pages, head, q, u);
}

// Whether rows a and b have the same keys in logical numbers [begin, end), as far as they have any.
INLINE bool same_keys(const AttentionStep& s, int64_t a, int64_t b, int64_t end) {
    return end <= s.context_lens[s.row_seq[a]] || s.tail_start[a] == s.tail_start[b];
}

// What one thread works off at a time: the rows of a group with a range of KV heads, and of each of
// these `fold` query heads, from number `first` of them on. All heads of a tile come before the next
// tile, since they lie side by side in memory.
struct Work {
    int64_t first_row, end_row, first_head, end_head;
    int fold, first;

    int64_t query_head(const AttentionStep& s, int64_t head, int f) const {
        return head * (s.heads / s.kv_heads) + first + f;
    }
    int query(int64_t head, int64_t row) const {
        return ((head - first_head) * (end_row - first_row) + row - first_row) * fold;
    }
};

template <class KV>
void begin_unit(const AttentionStep& s, const Work& w, const float* queries, int64_t query_stride, Unit& u) {
    for (int64_t head = w.first_head; head < w.end_head; head++)
        for (int64_t row = w.first_row; row < w.end_row; row++)
            for (int f = 0; f < w.fold; f++) {
                int q = w.query(head, row) + f;
                const float* from = queries + row * query_stride + w.query_head(s, head, f) * s.head_size;
                KV::put_query(from, u.queries[q], s.head_size);
                u.running[q].maximum = -INFINITY;
                u.running[q].total = 0;
                std::memset(u.running[q].values, 0, s.head_size * sizeof(float));
            }
}

// Set what row sees of the tile for all its queries; return the end of it.
INLINE int see(const AttentionStep& s, const Work& w, int64_t row, int64_t tile, Unit& u) {
    int64_t from = s.first_key ? s.first_key[row] : 0;
    int32_t first = std::clamp<int64_t>(from - tile, 0, TILE);
    int32_t last = std::clamp<int64_t>(s.num_keys[row] - tile, first, TILE);
    for (int64_t head = w.first_head; head < w.end_head; head++)
        for (int f = 0; f < w.fold; f++) {
            u.first[w.query(head, row) + f] = first;
            u.last[w.query(head, row) + f] = last;
        }
    return last;
}

// Rows [first, end), which read the same keys, meet a tile.
template <class KV>
void attend_rows(const AttentionStep& s, const Pages& pages, const Work& w, int64_t first, int64_t end,
                 int64_t tile, int count, Unit& u) {
    // Of rows with one tail the longest knows every place; shorter ones do not ask for more.
    int64_t longest = first;
    for (int64_t row = first; row < end; row++)
        if (s.num_keys[row] > s.num_keys[longest]) longest = row;
    // The values are due when the keys are done, and the next tile's keys after that.
    int64_t next = std::clamp<int64_t>(s.num_keys[longest] - tile - TILE, 0, TILE);
    find_places(s, longest, tile, tile + count, u.places);
    fetch<typename KV::T>(s, pages.value, w.first_head, w.end_head, u.places, count);
    find_places(s, longest, tile + TILE, tile + TILE + next, u.next_places);
    fetch<typename KV::T>(s, pages.key, w.first_head, w.end_head, u.next_places, next);
    auto sees = [&](int64_t row) {
        int q = w.query(w.first_head, row);
        return u.first[q] < u.last[q];
    };
    for (int64_t row = first; row < end;) {
        int64_t stop = row;
        while (stop < end && sees(stop)) stop++;
        for (int64_t head = w.first_head; head < w.end_head && stop > row; head++)
            attend_tile<KV>(s, pages, head, count, w.query(head, row), w.query(head, stop - 1) + w.fold, u);
        row = stop + 1;  // the one at `stop` sees nothing of this tile
    }
}

template <class KV>
void attend_unit(const AttentionStep& s, const Pages& pages, const Work& w, const float* queries,
                 int64_t query_stride, const Operand& out, Unit& u) {
    begin_unit<KV>(s, w, queries, query_stride, u);
    int64_t first_key = INT64_MAX, last_key = 0;
    for (int64_t row = w.first_row; row < w.end_row; row++) {
        first_key = std::min<int64_t>(first_key, s.first_key ? s.first_key[row] : 0);
        last_key = std::max<int64_t>(last_key, s.num_keys[row]);
    }
    for (int64_t tile = first_key / TILE * TILE; tile < last_key; tile += TILE)
        for (int64_t row = w.first_row; row < w.end_row;) {
            int count = 0;
            int64_t end = row;
            for (; end < w.end_row && same_keys(s, row, end, tile + TILE); end++)
                count = std::max(count, see(s, w, end, tile, u));
            attend_rows<KV>(s, pages, w, row, end, tile, count, u);
            row = end;
        }
    for (int64_t row = w.first_row; row < w.end_row; row++) {
        OperandRow to(out, row);
        for (int64_t head = w.first_head; head < w.end_head; head++)
            for (int f = 0; f < w.fold; f++) {
                Running& r = u.running[w.query(head, row) + f];
                for (int64_t d = 0; d < s.head_size; d += LANES)
                    to.put(w.query_head(s, head, f) * s.head_size + d, load(r.values + d) / r.total);
            }
    }
}

// Every `parts`-th unit of work, from `part` on: as many heads in one as it has room for, and as leave
// something for every thread. Who does what changes no bit.
void attend_part(const AttentionStep& s, const Pages& pages, const float* queries, int64_t query_stride,
                 const Operand& out, int64_t part, int64_t parts);

// Write a row's key or value, [kv_heads, head_size], to its slot.
INLINE void write_kv(const AttentionStep& s, void* pages, int64_t slot, const float* from) {
    int64_t size = s.kv_heads * s.head_size;
    if (s.kv_format == BFLOAT16) copy_converted(from, (bfloat16*)pages + slot * size, size);
    else copy_converted(from, (float*)pages + slot * size, size);
}

}  // namespace folospec
