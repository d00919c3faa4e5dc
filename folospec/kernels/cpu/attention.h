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
constexpr int MAX_QUERIES = 32;  // of one unit: rows times the query heads of one KV head

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
    int64_t slots[TILE];
    int32_t first[MAX_QUERIES], last[MAX_QUERIES];  // the keys of the tile that each query sees
};

// One step of the score's sum: a dimension of float32, two of bfloat16.
struct Float32KV {
    typedef float T;
    static constexpr int PER_WORD = 1;
    INLINE Vec score(Vec query, Vec keys, Vec sums) { return fma(query, keys, sums); }
    INLINE void put_query(const float* from, float* to, int64_t size) { copy_converted(from, to, size); }
};

struct BFloat16KV {
    typedef bfloat16 T;
    static constexpr int PER_WORD = 2;
    INLINE Vec score(Vec query, Vec keys, Vec sums) {
        return dot_pairs(as<UintVec>(query), as<UintVec>(keys), sums);
    }
    INLINE void put_query(const float* from, float* to, int64_t size) {
        copy_converted(from, (bfloat16*)to, size);
    }
};

INLINE int64_t slot_of(const AttentionStep& s, int64_t row, int64_t key) {
    int64_t seq = s.row_seq[row], context = s.context_lens[seq];
    if (key >= context) return s.tail_slots[s.tail_start[row] + key - context];
    return (int64_t)s.block_table[seq * s.table_width + key / s.block_size] * s.block_size +
           key % s.block_size;
}

// Transpose `count` keys of one head: word w of key j goes to keys[w * TILE + j].
template <class KV>
void load_keys(const AttentionStep& s, const Pages& pages, int64_t head, int count, Unit& u) {
    const typename KV::T* keys = (const typename KV::T*)pages.key;
    int64_t words = s.head_size / KV::PER_WORD;
    for (int j = 0; j < count; j += LANES)
        for (int64_t w = 0; w < words; w += LANES) {
            Vec block[LANES];
            for (int i = 0; i < LANES; i++) {
                int64_t slot = u.slots[j + i < count ? j + i : count - 1];
                std::memcpy(&block[i], keys + (slot * s.kv_heads + head) * s.head_size + w * KV::PER_WORD,
                            sizeof(Vec));
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) store(u.keys + (w + i) * TILE + j, block[i]);
        }
}

template <class KV, int Q>
void score_keys(const AttentionStep& s, int first, Unit& u) {
    constexpr int VECS = TILE / LANES;
    int64_t words = s.head_size / KV::PER_WORD;
    Vec sums[Q][VECS] = {};
    for (int64_t w = 0; w < words; w++)
        for (int v = 0; v < VECS; v++) {
            Vec keys = load(u.keys + w * TILE + v * LANES);
            for (int q = 0; q < Q; q++)
                sums[q][v] = KV::score(splat(u.queries[first + q][w]), keys, sums[q][v]);
        }
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < VECS; v++) store(u.scores[first + q] + v * LANES, sums[q][v]);
}

// Turn a query's scores into weights under the running maximum, and rescale what it has.
INLINE void weigh(const AttentionStep& s, int q, Unit& u) {
    constexpr int VECS = TILE / LANES;
    const IntVec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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

// Add keys [begin, end) of the tile to the weighted values of Q queries, one key after the other.
template <class KV, int Q>
void add_values(const AttentionStep& s, const Pages& pages, int64_t head, int first, int begin, int end,
                Unit& u) {
    constexpr int VECS = 2;  // head sizes are multiples of 32
    const typename KV::T* values = (const typename KV::T*)pages.value;
    for (int64_t d = 0; d < s.head_size; d += VECS * LANES) {
        Vec sums[Q][VECS];
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECS; v++) sums[q][v] = load(u.running[first + q].values + d + v * LANES);
        for (int j = begin; j < end; j++) {
            const typename KV::T* from = values + (u.slots[j] * s.kv_heads + head) * s.head_size + d;
            for (int v = 0; v < VECS; v++) {
                Vec value = load(from + v * LANES);
                for (int q = 0; q < Q; q++)
                    sums[q][v] = fma(splat(u.scores[first + q][j]), value, sums[q][v]);
            }
        }
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < VECS; v++) store(u.running[first + q].values + d + v * LANES, sums[q][v]);
    }
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
        add_values<KV, 1>(s, pages, head, q, u.first[q], std::min(begin, u.last[q]), u);
    add_values<KV, Q>(s, pages, head, first, begin, end, u);
    for (int q = first; q < first + Q; q++)
        add_values<KV, 1>(s, pages, head, q, std::max(end, u.first[q]), u.last[q], u);
}

// Queries [first, end) meet one tile, whose slots are loaded.
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

// Let the rows of one group attend with the query heads of one KV head.
template <class KV>
void attend_unit(const AttentionStep& s, const Pages& pages, int64_t group, int64_t head,
                 const float* queries, int64_t query_stride, const Operand& out, Unit& u) {
    int64_t first_row = s.group_start[group], end_row = s.group_start[group + 1];
    int fold = s.heads / s.kv_heads;
    int64_t first_key = INT64_MAX, last_key = 0;
    for (int64_t row = first_row; row < end_row; row++) {
        first_key = std::min<int64_t>(first_key, s.first_key ? s.first_key[row] : 0);
        last_key = std::max<int64_t>(last_key, s.num_keys[row]);
        for (int f = 0; f < fold; f++) {
            int q = (row - first_row) * fold + f;
            KV::put_query(queries + row * query_stride + (head * fold + f) * s.head_size, u.queries[q],
                          s.head_size);
            u.running[q].maximum = -INFINITY;
            u.running[q].total = 0;
            std::memset(u.running[q].values, 0, s.head_size * sizeof(float));
        }
    }
    for (int64_t tile = first_key / TILE * TILE; tile < last_key; tile += TILE)
        for (int64_t row = first_row; row < end_row;) {
            // Rows from `row` to `end` read the same keys here; the last of them, or one before it,
            // reads the most.
            int64_t end = row, count = 0;
            for (; end < end_row && same_keys(s, row, end, tile + TILE); end++) {
                int64_t from = s.first_key ? s.first_key[end] : 0;
                int32_t first = std::clamp<int64_t>(from - tile, 0, TILE);
                int32_t last = std::clamp<int64_t>(s.num_keys[end] - tile, first, TILE);
                count = std::max<int64_t>(count, last);
                for (int f = 0; f < fold; f++) {
                    u.first[(end - first_row) * fold + f] = first;
                    u.last[(end - first_row) * fold + f] = last;
                }
            }
            // Of rows with one tail the longest knows every slot; shorter ones do not ask for more.
            int64_t longest = row;
            for (int64_t r = row; r < end; r++)
                if (s.num_keys[r] > s.num_keys[longest]) longest = r;
            for (int64_t j = 0; j < count; j++) u.slots[j] = slot_of(s, longest, tile + j);
            for (int64_t r = row; r < end;) {
                // Skip rows that see nothing of this tile.
                int64_t stop = r;
                auto sees = [&](int64_t x) {
                    int q = (x - first_row) * fold;
                    return u.first[q] < u.last[q];
                };
                while (stop < end && sees(stop)) stop++;
                if (stop > r)
                    attend_tile<KV>(s, pages, head, count, (r - first_row) * fold,
                                    (stop - first_row) * fold, u);
                r = stop + 1;
            }
            row = end;
        }
    for (int64_t row = first_row; row < end_row; row++) {
        OperandRow to(out, row);
        for (int f = 0; f < fold; f++) {
            Running& r = u.running[(row - first_row) * fold + f];
            for (int64_t d = 0; d < s.head_size; d += LANES)
                to.put((head * fold + f) * s.head_size + d, load(r.values + d) / r.total);
        }
    }
}

// Every `parts`-th unit of work, from `part` on.
INLINE void attend_part(const AttentionStep& s, const Pages& pages, const float* queries,
                        int64_t query_stride, const Operand& out, int64_t part, int64_t parts) {
    static thread_local Unit unit;
    for (int64_t i = part; i < s.groups * s.kv_heads; i += parts) {
        int64_t group = i / s.kv_heads, head = i % s.kv_heads;
        if (s.kv_format == BFLOAT16)
            attend_unit<BFloat16KV>(s, pages, group, head, queries, query_stride, out, unit);
        else
            attend_unit<Float32KV>(s, pages, group, head, queries, query_stride, out, unit);
    }
}

// Write a row's key or value, [kv_heads, head_size], to its slot.
INLINE void write_kv(const AttentionStep& s, void* pages, int64_t slot, const float* from) {
    int64_t size = s.kv_heads * s.head_size;
    if (s.kv_format == BFLOAT16) copy_converted(from, (bfloat16*)pages + slot * size, size);
    else copy_converted(from, (float*)pages + slot * size, size);
}

}  // namespace folospec
