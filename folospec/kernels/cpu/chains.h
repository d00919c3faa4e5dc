// Chains of draft tokens in one call: draw a token of every chain, run the tokens, draw the next, ...
//
//     logits of the roots --> draw | run | logits --> draw | run | logits --> draw      all in one parallel region
//                              a                       b                       c
//
// A draft model's pass takes so little time that coming back to Python for every token costs as much again.
// What a chain has drawn, and the KV that it writes, are those of a pass for each token, to the bit.
#pragma once

#include "children.h"
#include "decoder.h"

namespace folospec {

struct Chains {
    AttentionStep attention;     // sizes, block table and scale alone; a row for each chain
    const Matrix* lm_head;
    const float* cos;            // [positions, head_size / 2]
    const float* sin;
    const int64_t* windows;      // [num_windows] that layers have
    int64_t num_windows;
    const int64_t* starts;       // [chains] position, and index in the block table, of the first token
    const SamplingParams* all_params;             // [chains]
    const Wanted* wanted;        // [chains] of the first token; `params` counts in `all_params`
    const int64_t* lengths;      // [chains] tokens that are wanted, at least 1
    const double* min_probability;         // [chains] a chain that is less likely does not go on
    int64_t most;                // the largest of `lengths`
    const float* logits;         // [chains, out of lm_head], of the rows that the first tokens follow
    int64_t* tokens;             // [chains, most], the result
    float* chances;              // [chains, most]
    int64_t* found;              // [chains] tokens that were drawn
    float* scratch;
    int64_t threads;
};

// The token of every chain that goes on, and where its row finds its keys. A thread without a core for now may look
// at it late, when others are tokens ahead: it is written once.
struct ChainRows {
    std::vector<int32_t> chain, num_keys, context_lens, window_first;
    std::vector<int64_t> ids, positions, slots;
    int64_t count() const { return chain.size(); }
};

class ChainWorker {
public:
    ChainWorker(const Model& model, const Chains& job)
        : m(model), c(job), vocab(job.lm_head->out), chains(job.attention.rows), rows(job.most),
          joint(chains, 1.0), identity(chains + 1), drawn(chains), aux_hidden_states(model.num_layers + 1) {
        for (int64_t i = 0; i <= chains; i++) identity[i] = i;
        groups.assign(identity.begin(), identity.end());
        std::fill(c.found, c.found + chains, 0);
        float* at = c.scratch + lay_out(m, c.attention, c.scratch, s);
        hidden = at, at += padded(chains * m.hidden);
        room = at, at += padded(chains * (m.hidden + 31));
        next_logits = at;
    }

    static int64_t scratch_floats(const Model& m, const Chains& c) {
        Scratch s;
        return lay_out(m, c.attention, nullptr, s) + padded(c.attention.rows * m.hidden) +
               padded(c.attention.rows * (m.hidden + 31)) + padded(c.attention.rows * c.lm_head->out);
    }

    void run(Member& member) {
        for (int64_t depth = 0;; depth++) {
            int64_t count = depth ? rows[depth - 1].count() : chains;
            member.share(count, 1, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; row++) draw(depth, row);
            });
            member.share(1, 1, [&](int64_t begin, int64_t end) {
                if (begin < end) take(depth, count);
            });
            if (depth + 1 == c.most || rows[depth].count() == 0) return;
            Pass pass = pass_of(rows[depth]);
            Worker(m, pass, s, member).run();
            linear_rows(*c.lm_head, hidden, room, pass.attention.rows, next_logits, member);
        }
    }

    // Tokens that were run after one another.
    int64_t num_passes() const {
        int64_t passes = 0;
        while (passes < c.most && rows[passes].count() > 0) passes++;
        return passes;
    }

private:
    struct Drawn {
        int64_t id, count;
        float chance;
    };

    const Model& m;
    const Chains& c;
    const int64_t vocab, chains;
    std::vector<ChainRows> rows;  // by depth
    std::vector<double> joint;
    std::vector<int64_t> identity;
    std::vector<int32_t> groups;
    std::vector<Drawn> drawn;     // of each row
    std::vector<float*> aux_hidden_states;     // none
    Scratch s;
    float *hidden, *room, *next_logits;

    void draw(int64_t depth, int64_t row) {
        static thread_local ChildRoom memory;
        int64_t chain = depth ? rows[depth - 1].chain[row] : row;
        Wanted wanted = c.wanted[chain];
        if (wanted.position != NO_NOISE) wanted.position += depth;
        const float* logits = (depth ? next_logits : c.logits) + row * vocab;
        Drawn& to = drawn[row];
        to.count = ChildRow(logits, vocab, c.all_params[wanted.params], wanted, memory).draw(&to.id, &to.chance);
    }

    // Note what was drawn, and number the rows of the chains that go on.
    void take(int64_t depth, int64_t count) {
        ChainRows& next = rows[depth];
        for (int64_t row = 0; row < count; row++) {
            int64_t chain = depth ? rows[depth - 1].chain[row] : row;
            if (drawn[row].count == 0) continue;
            c.tokens[chain * c.most + depth] = drawn[row].id;
            c.chances[chain * c.most + depth] = drawn[row].chance;
            c.found[chain] = depth + 1;
            joint[chain] *= drawn[row].chance;
            if (depth + 1 == c.lengths[chain] || joint[chain] < c.min_probability[chain]) continue;
            int64_t position = c.starts[chain] + depth, size = c.attention.block_size;
            const int32_t* table = c.attention.block_table + chain * c.attention.table_width;
            next.chain.push_back(chain);
            next.ids.push_back(drawn[row].id);
            next.positions.push_back(position);
            next.slots.push_back(table[position / size] * size + position % size);
            next.num_keys.push_back(position + 1);
        }
        next.context_lens.resize(chains);
        for (int64_t row = 0; row < next.count(); row++) next.context_lens[next.chain[row]] = next.positions[row];
        for (int64_t window = 0; window < c.num_windows; window++)
            for (int32_t keys : next.num_keys)
                next.window_first.push_back(std::max<int64_t>(keys - c.windows[window], 0));
    }

    Pass pass_of(const ChainRows& r) {
        Pass pass = {};
        pass.attention = c.attention;
        pass.attention.rows = pass.attention.groups = r.count();
        pass.attention.row_seq = r.chain.data();
        pass.attention.num_keys = r.num_keys.data();
        pass.attention.context_lens = r.context_lens.data();
        pass.attention.tail_start = identity.data();
        pass.attention.tail_slots = r.slots.data();
        pass.attention.group_start = groups.data();
        pass.input_ids = r.ids.data();
        pass.positions = r.positions.data();
        pass.slot_mapping = r.slots.data();
        pass.cos = c.cos;
        pass.sin = c.sin;
        pass.window_first = r.window_first.data();
        pass.hidden = hidden;
        pass.aux_hidden_states = aux_hidden_states.data();
        pass.scratch = c.scratch;
        pass.threads = c.threads;
        return pass;
    }
};

}  // namespace folospec
