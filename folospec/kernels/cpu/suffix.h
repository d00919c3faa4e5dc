// The trees of the suffix drafter, and its drafts: the native form of spec/stores/suffix_index.py, which says
// what is computed. Proposals are the same, bit for bit: ratios are float64, multiplied from the root
// down and added in the order of the nodes, and what is equal goes by the order in which it came.
//
//     ask: new tokens of a sequence  -->  own tree grows, points of the shared one advance
//                                    -->  the best draft under any of these points
#pragma once

#include <cmath>
#include <memory>
#include <unordered_map>

#include "suffix_tree.h"

namespace folospec {

struct SuffixRules {
    int64_t max_depth, max_tokens;
    double spec_factor, spec_offset, min_joint, min_score;
    int64_t is_chain;
};

struct SuffixAsk {
    int64_t sequence, num_new, max_nodes, max_depth;
};

struct SuffixAnswer {
    int64_t num_nodes, length, is_shared;  // no nodes: no draft
};

// Texts of at most `max_tokens` tokens together, and their tree; the least recently used goes first.
class SuffixStore {
public:
    SuffixStore(int32_t max_depth, int64_t max_tokens) : tree(max_depth), max_tokens(max_tokens) {}

    SuffixTree tree;
    std::list<int32_t> texts;  // the least recently used first
    int64_t num_tokens = 0, num_evictions = 0;
    int64_t version = 0;  // changes whenever points in the tree may have become wrong

    void add(const int32_t* ids, int64_t size) {
        int64_t kept = std::min(size, max_tokens);
        if (kept == 0) return;
        version++;
        while (num_tokens + kept > max_tokens) evict();
        SuffixWriter writer(tree);
        for (int64_t i = size - kept; i < size; i++) writer.append(ids[i]);
        writer.close();
        SuffixText& text = tree.texts[writer.text];
        text.is_stored = true;
        text.place = texts.insert(texts.end(), writer.text);
        num_tokens += kept;
    }

    // Note that a text has been of use; a copy that outlived its text is none.
    void touch(int32_t text) {
        if (tree.texts[text].is_stored) texts.splice(texts.end(), texts, tree.texts[text].place);
    }

private:
    const int64_t max_tokens;

    void evict() {
        int32_t oldest = texts.front();
        texts.pop_front();
        num_tokens -= (int64_t)tree.texts[oldest].ids.size();
        tree.remove(oldest);
        tree.release(oldest);
        num_evictions++;
    }
};

// One sequence's own tree, and its place in the shared one.
struct SuffixSequence {
    explicit SuffixSequence(int32_t max_depth) : own(max_depth), writer(own) {}

    SuffixTree own;
    SuffixWriter writer;
    std::vector<SuffixPoint> shared;
    int64_t version = -1;

    const std::vector<int32_t>& ids() const { return own.texts[writer.text].ids; }

    void update(const int32_t* tail, int64_t num_new, const SuffixStore& store) {
        for (int64_t i = 0; i < num_new; i++) writer.append(tail[i]);
        int64_t size = (int64_t)ids().size(), reach = store.tree.max_depth - 1;
        if (version != store.version || num_new > reach) {
            version = store.version;
            shared.clear();
            num_new = std::min(size, reach);
        }
        for (int64_t i = size - num_new; i < size; i++) follow(ids()[i], store.tree);
    }

private:
    void follow(int32_t token, const SuffixTree& tree) {
        shared.push_back({0, 0, false});
        size_t kept = 0;
        for (SuffixPoint point : shared)
            if (tree.advance(point, token) && point.depth < tree.max_depth) shared[kept++] = point;
        shared.resize(kept);
    }
};

// A draft while it grows: nodes in the order in which they were added.
struct SuffixDraft {
    std::vector<int32_t> token_ids, parents;
    std::vector<double> ratios;
    double score = 0;

    void clear() { token_ids.clear(), parents.clear(), ratios.clear(), score = 0; }
    int64_t size() const { return (int64_t)token_ids.size(); }
};

// Grows drafts under points of a tree, the likeliest node first.
class SuffixGrower {
public:
    explicit SuffixGrower(const SuffixRules& rules) : rules(rules) {}

    void grow(const SuffixTree& tree, SuffixPoint root, int64_t max_nodes, int64_t max_depth, SuffixDraft& draft) {
        draft.clear(), heap.clear(), num_seen = 0;
        if (max_nodes > 0) offer(tree, {1.0, 0, 0, -1, 0, 0, 0, root}, -1, max_depth);
        while (!heap.empty() && draft.size() < max_nodes) {
            std::pop_heap(heap.begin(), heap.end());
            ScoredProposal best = heap.back();
            heap.pop_back();
            draft.token_ids.push_back(best.token);
            draft.parents.push_back(best.parent);
            draft.ratios.push_back((double)best.count / (double)(best.total + 1));
            draft.score += best.joint;
            if (draft.size() < max_nodes) offer(tree, best, (int32_t)draft.size() - 1, max_depth);
        }
    }

private:
    struct ScoredProposal {
        double joint;
        int64_t seen;
        int32_t token, parent, depth, count, total;
        SuffixPoint point;
        bool operator<(const ScoredProposal& other) const {
            return joint < other.joint || (joint == other.joint && seen > other.seen);
        }
    };

    const SuffixRules& rules;
    std::vector<ScoredProposal> heap;
    int64_t num_seen = 0;

    // Offer what has followed a node, what was first seen last coming first.
    void offer(const SuffixTree& tree, const ScoredProposal& above, int32_t parent, int64_t max_depth) {
        if (above.depth >= max_depth) return;
        SuffixPoint point = above.point;
        const SuffixNode& node = tree.nodes[point.node];
        if (point.depth < node.depth) {
            int32_t token = tree.token_at(node, point.depth);
            if (token >= 0) push(above, parent, token, node.count, node.count, point.node);
            return;
        }
        int32_t total = 0, most = NONE;
        for (int32_t child = node.last; child != NONE; child = tree.nodes[child].prev) {
            total += tree.nodes[child].count;
            if (most == NONE || tree.nodes[child].count > tree.nodes[most].count) most = child;
        }
        for (int32_t child = rules.is_chain ? most : node.last; child != NONE; child = tree.nodes[child].prev) {
            push(above, parent, tree.nodes[child].token, tree.nodes[child].count, total, child);
            if (rules.is_chain) break;
        }
    }

    void push(const ScoredProposal& above, int32_t parent, int32_t token, int32_t count, int32_t total, int32_t node) {
        double joint = above.joint * ((double)count / (double)total);
        if (!(joint >= rules.min_joint)) return;
        SuffixPoint point = {node, above.point.depth + 1, false};
        heap.push_back({joint, num_seen++, token, parent, above.depth + 1, count, total, point});
        std::push_heap(heap.begin(), heap.end());
    }
};

class SuffixIndex {
public:
    explicit SuffixIndex(const SuffixRules& rules)
        : rules(rules), store((int32_t)rules.max_depth, rules.max_tokens), grower(this->rules) {}

    const SuffixRules rules;
    SuffixStore store;
    std::unordered_map<int64_t, SuffixSequence> sequences;

    // The draft with the highest score; of equal ones that with the longest match, and of these the
    // sequence's own. Valid until the next call.
    SuffixAnswer draft(const SuffixAsk& ask, const int32_t* tail, const SuffixDraft*& found) {
        SuffixSequence& sequence =
            sequences.try_emplace(ask.sequence, (int32_t)rules.max_depth).first->second;
        sequence.update(tail, ask.num_new, store);
        matches.clear();
        match(sequence.writer.points, false, ask);
        match(sequence.shared, true, ask);
        std::sort(matches.begin(), matches.end());
        best.clear();
        const Match* from = nullptr;
        for (const Match& match : matches) {
            if (match.bound <= best.score) break;
            const SuffixTree& tree = match.is_shared ? store.tree : sequence.own;
            grower.grow(tree, match.point, match.max_nodes, match.bound, grown);
            if (grown.score > best.score) {
                std::swap(best, grown);
                from = &match;
            }
        }
        found = &best;
        if (from == nullptr || best.score < rules.min_score) return {0, 0, 0};
        if (from->is_shared) store.touch(store.tree.nodes[from->point.node].text);
        return {best.size(), from->point.depth, from->is_shared};
    }

private:
    // The last `point.depth` tokens of a sequence, found in a tree.
    struct Match {
        SuffixPoint point;
        bool is_shared;
        int64_t max_nodes, bound;  // no draft from here scores more: as deep as it can be
        bool operator<(const Match& other) const {
            if (bound != other.bound) return bound > other.bound;
            if (point.depth != other.point.depth) return point.depth > other.point.depth;
            return is_shared < other.is_shared;
        }
    };

    SuffixGrower grower;
    std::vector<Match> matches;
    SuffixDraft best, grown;

    void match(const std::vector<SuffixPoint>& points, bool is_shared, const SuffixAsk& ask) {
        for (const SuffixPoint& point : points) {
            // A number that is none becomes 0.
            double allowed = std::max(0.0, std::floor(rules.spec_factor * point.depth + rules.spec_offset));
            int64_t max_nodes = (int64_t)std::min(allowed, (double)ask.max_nodes);
            int64_t bound = std::min({max_nodes, ask.max_depth, rules.max_depth - point.depth});
            matches.push_back({point, is_shared, max_nodes, bound});
        }
    }
};

}  // namespace folospec

#define EXPORT_SUFFIX extern "C" __attribute__((visibility("default")))

EXPORT_SUFFIX void folospec_suffix_sizes(int64_t* sizes) {
    sizes[0] = sizeof(folospec::SuffixRules);
    sizes[1] = sizeof(folospec::SuffixAsk);
    sizes[2] = sizeof(folospec::SuffixAnswer);
}

EXPORT_SUFFIX folospec::SuffixIndex* folospec_suffix_new(const folospec::SuffixRules* rules) {
    return new folospec::SuffixIndex(*rules);
}

EXPORT_SUFFIX void folospec_suffix_free(folospec::SuffixIndex* index) { delete index; }

EXPORT_SUFFIX void folospec_suffix_add(folospec::SuffixIndex* index, const int32_t* ids, int64_t size) {
    index->store.add(ids, size);
}

EXPORT_SUFFIX void folospec_suffix_drop(folospec::SuffixIndex* index, int64_t sequence) {
    index->sequences.erase(sequence);
}

// `tails` has the new tokens of all rows, one after the other. The nodes of a draft are written behind
// those of the row before: there must be room for `max_nodes` of every row.
EXPORT_SUFFIX void folospec_suffix_draft(folospec::SuffixIndex* index, const folospec::SuffixAsk* asks,
                                         int64_t rows, const int32_t* tails, folospec::SuffixAnswer* answers,
                                         int32_t* token_ids, int32_t* parents, double* ratios) {
    const folospec::SuffixDraft* found = nullptr;
    for (int64_t row = 0; row < rows; tails += asks[row].num_new, row++) {
        answers[row] = index->draft(asks[row], tails, found);
        if (answers[row].num_nodes == 0) continue;
        token_ids = std::copy(found->token_ids.begin(), found->token_ids.end(), token_ids);
        parents = std::copy(found->parents.begin(), found->parents.end(), parents);
        ratios = std::copy(found->ratios.begin(), found->ratios.end(), ratios);
    }
}

// Texts, tokens, nodes and evictions of the store; sequences; tokens, nodes and bytes of all.
EXPORT_SUFFIX void folospec_suffix_stats(const folospec::SuffixIndex* index, int64_t* stats) {
    const folospec::SuffixStore& store = index->store;
    int64_t tokens = store.num_tokens, nodes = store.tree.num_nodes(), bytes = store.tree.num_bytes();
    for (const auto& [number, sequence] : index->sequences) {
        tokens += (int64_t)sequence.ids().size();
        nodes += sequence.own.num_nodes();
        bytes += (int64_t)sizeof(sequence) + sequence.own.num_bytes();
    }
    int64_t found[] = {(int64_t)store.texts.size(), store.num_tokens, store.tree.num_nodes(), store.num_evictions,
                       (int64_t)index->sequences.size(), tokens, nodes, bytes};
    std::copy(std::begin(found), std::end(found), stats);
}

// The texts of the store, the least recently used first: their lengths, and their tokens together.
EXPORT_SUFFIX void folospec_suffix_texts(const folospec::SuffixIndex* index, int64_t* lengths, int32_t* ids) {
    for (int32_t text : index->store.texts) {
        const std::vector<int32_t>& tokens = index->store.tree.texts[text].ids;
        *lengths++ = (int64_t)tokens.size();
        ids = std::copy(tokens.begin(), tokens.end(), ids);
    }
}
