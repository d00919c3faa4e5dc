// A suffix tree of bounded depth with counts, for many texts. What it holds, and the rules by which it
// grows and shrinks, are those of spec/stores/suffix_tree.py; this is how it lies in memory.
//
//     nodes   [ root | abc 3 | b 2 | free | ... ]    a pool; nodes name each other by their index
//                first -> next -> next               children, in the order in which they came
//     table   hash(parent, token) -> child           one for all nodes, so that fan-out costs nothing
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <vector>

namespace folospec {

constexpr int32_t NONE = 0;  // instead of a node: the root is nobody's child

// The end of an edge. Its path is text[start : start + depth]; a leaf of a text that is still being
// written may be longer than the text is yet.
struct SuffixNode {
    int32_t text, start, depth, count;
    int32_t parent, token;  // the first token of the edge
    int32_t first, last, next, prev;  // children; siblings
};

// Tokens that nodes are read from. They stay as long as somebody holds them: a node, or an owner.
struct SuffixText {
    std::vector<int32_t> ids;
    int64_t holders = 0;
    bool is_stored = false;
    std::list<int32_t>::iterator place;  // where it is in the store's order of use
};

// A place in the tree, `depth` tokens below the root: on the edge into `node`, or at its end.
struct SuffixPoint {
    int32_t node, depth;
    bool matched;
};

class SuffixTree {
public:
    explicit SuffixTree(int32_t max_depth) : max_depth(max_depth), nodes(1), table(16) {}

    const int32_t max_depth;
    std::vector<SuffixNode> nodes;
    std::vector<SuffixText> texts;

    int64_t num_nodes() const { return num_live; }

    int64_t num_bytes() const {
        int64_t bytes = nodes.capacity() * sizeof(SuffixNode) + texts.capacity() * sizeof(SuffixText) +
                        (table.capacity() + free_nodes.capacity() + free_texts.capacity()) * sizeof(int32_t);
        for (const SuffixText& text : texts) bytes += text.ids.capacity() * sizeof(int32_t);
        return bytes;
    }

    // The token after a place on an edge; -1 if its text has none yet.
    int32_t token_at(const SuffixNode& node, int32_t depth) const {
        const std::vector<int32_t>& ids = texts[node.text].ids;
        size_t place = (size_t)node.start + depth;
        return place < ids.size() ? ids[place] : -1;
    }

    // Go on by a token, or stay where it never followed.
    bool advance(SuffixPoint& point, int32_t token) const {
        const SuffixNode& node = nodes[point.node];
        if (point.depth < node.depth) {
            if (token_at(node, point.depth) != token) return false;
        } else {
            int32_t child = table[find(point.node, token)];
            if (child == NONE) return false;
            point.node = child;
        }
        point.depth++;
        return true;
    }

    int32_t new_text() {
        if (free_texts.empty()) {
            texts.emplace_back();
            return (int32_t)texts.size() - 1;
        }
        int32_t text = free_texts.back();
        free_texts.pop_back();
        return text;
    }

    void hold(int32_t text) { texts[text].holders++; }

    void release(int32_t text) {
        if (--texts[text].holders > 0) return;
        texts[text] = SuffixText();
        free_texts.push_back(text);
    }

    void read_from(SuffixNode& node, int32_t text, int32_t start) {
        hold(text);
        release(node.text);
        node.text = text, node.start = start;
    }

    void add_leaf(int32_t parent, int32_t token, int32_t text, int32_t start) {
        int32_t leaf = new_node({text, start, max_depth, 1, parent, token, NONE, NONE, NONE, NONE});
        append(parent, leaf);
        enter(leaf);
    }

    // Make the end of a node of a place on the edge into `lower`; the node is returned, and has what
    // `lower` had above it.
    int32_t split(int32_t lower, int32_t depth) {
        int32_t upper = new_node(nodes[lower]);
        SuffixNode &above = nodes[upper], &below = nodes[lower];
        replace(lower, upper);
        above.depth = depth;
        above.first = above.last = lower;
        below.parent = upper, below.token = token_at(below, depth);
        below.next = below.prev = NONE;
        enter(lower);
        return upper;
    }

    // Take back a closed text: afterwards the tree is as if it had never been written.
    void remove(int32_t text) {
        int32_t size = (int32_t)texts[text].ids.size();
        for (int32_t start = 0; start < size; start++)
            remove_suffix(text, start, std::min(max_depth, size - start));
    }

private:
    std::vector<int32_t> table;  // of nodes, by parent and token: open addressing, half empty at least
    std::vector<int32_t> free_nodes, free_texts, path;
    int64_t num_live = 0;

    int32_t new_node(const SuffixNode& node) {
        num_live++;
        hold(node.text);
        if (free_nodes.empty()) {
            SuffixNode copy = node;  // which may lie in what is about to move
            nodes.push_back(copy);
            return (int32_t)nodes.size() - 1;
        }
        int32_t place = free_nodes.back();
        free_nodes.pop_back();
        nodes[place] = node;
        return place;
    }

    void free_node(int32_t node) {
        num_live--;
        release(nodes[node].text);
        free_nodes.push_back(node);
    }

    void remove_suffix(int32_t text, int32_t start, int32_t length) {
        int32_t node = 0, stale = 0;
        path.clear();
        while (nodes[node].depth < length) {
            int32_t child = table[find(node, texts[text].ids[start + nodes[node].depth])];
            if (--nodes[child].count == 0) {
                leave(child);
                unlink(child);
                free_node(child);
                break;
            }
            path.push_back(child);
            if (nodes[child].text == text) stale = nodes[child].depth;
            node = child;
        }
        // What others share must not be read from a text that is gone; it is copied once per suffix.
        if (stale > 0) {
            int32_t copy = new_text();
            const std::vector<int32_t>& ids = texts[text].ids;
            texts[copy].ids.assign(ids.begin() + start, ids.begin() + start + stale);
            for (int32_t other : path)
                if (nodes[other].text == text) read_from(nodes[other], copy, 0);
        }
        if (!path.empty()) compress(node);
    }

    // Make one edge of two if nothing ends or branches at the node between them.
    void compress(int32_t upper) {
        int32_t lower = nodes[upper].first;
        if (lower == NONE || lower != nodes[upper].last || nodes[lower].count != nodes[upper].count) return;
        leave(lower);
        nodes[lower].parent = nodes[upper].parent, nodes[lower].token = nodes[upper].token;
        replace(upper, lower);
        free_node(upper);
    }

    void append(int32_t parent, int32_t child) {
        int32_t last = nodes[parent].last;
        nodes[child].prev = last;
        (last == NONE ? nodes[parent].first : nodes[last].next) = child;
        nodes[parent].last = child;
    }

    void unlink(int32_t child) {
        const SuffixNode& gone = nodes[child];
        (gone.prev == NONE ? nodes[gone.parent].first : nodes[gone.prev].next) = gone.next;
        (gone.next == NONE ? nodes[gone.parent].last : nodes[gone.next].prev) = gone.prev;
    }

    // Put a node in the place that another has among its siblings and in the table.
    void replace(int32_t old, int32_t node) {
        const SuffixNode& gone = nodes[old];
        table[find(gone.parent, gone.token)] = node;
        (gone.prev == NONE ? nodes[gone.parent].first : nodes[gone.prev].next) = node;
        (gone.next == NONE ? nodes[gone.parent].last : nodes[gone.next].prev) = node;
        nodes[node].prev = gone.prev, nodes[node].next = gone.next;
    }

    size_t home(int32_t parent, int32_t token) const {
        uint64_t key = ((uint64_t)(uint32_t)parent << 32 | (uint32_t)token) * 0x9E3779B97F4A7C15u;
        return (key ^ key >> 32) & (table.size() - 1);
    }

    // Where a child is in the table, or the empty place where it would be.
    size_t find(int32_t parent, int32_t token) const {
        for (size_t place = home(parent, token);; place = (place + 1) & (table.size() - 1)) {
            const SuffixNode& found = nodes[table[place]];
            if (table[place] == NONE || (found.parent == parent && found.token == token)) return place;
        }
    }

    void enter(int32_t node) {
        if (2 * (size_t)num_live > table.size()) {
            std::vector<int32_t> old(2 * table.size());
            old.swap(table);
            for (int32_t other : old)
                if (other != NONE) table[find(nodes[other].parent, nodes[other].token)] = other;
        }
        table[find(nodes[node].parent, nodes[node].token)] = node;
    }

    // Empty a place, and move up those behind it that are not at home where they are.
    void leave(int32_t node) {
        size_t mask = table.size() - 1, hole = find(nodes[node].parent, nodes[node].token);
        for (size_t place = (hole + 1) & mask; table[place] != NONE; place = (place + 1) & mask) {
            size_t wanted = home(nodes[table[place]].parent, nodes[table[place]].token);
            if (((place - wanted) & mask) < ((place - hole) & mask)) continue;
            table[hole] = table[place];
            hole = place;
        }
        table[hole] = NONE;
    }
};

// Adds a text to a tree, token by token. `points` are its suffixes that occurred before, the longest
// first, without one as long as `max_depth`.
class SuffixWriter {
public:
    explicit SuffixWriter(SuffixTree& tree) : text(tree.new_text()), tree(tree) { tree.hold(text); }

    const int32_t text;  // held; who releases it is the owner's business
    std::vector<SuffixPoint> points;

    void append(int32_t token) {
        std::vector<int32_t>& ids = tree.texts[text].ids;
        ids.push_back(token);
        points.push_back({0, 0, false});
        for (SuffixPoint& point : points) {
            int32_t before = point.node;
            if (!tree.advance(point, token)) {
                split(point);
                tree.add_leaf(point.node, token, text, (int32_t)ids.size() - 1 - point.depth);
                point.matched = false;  // it stays until the others are done, to be counted where they split
                continue;
            }
            SuffixNode& node = tree.nodes[point.node];
            if (point.node != before) node.count++;
            // The newest text that has the path: it will be there for longest.
            if (point.depth == node.depth) tree.read_from(node, text, (int32_t)ids.size() - point.depth);
            point.matched = point.depth < tree.max_depth;
        }
        points.erase(std::remove_if(points.begin(), points.end(), [](auto& point) { return !point.matched; }),
                     points.end());
    }

    // End the text, at the tokens it has: every suffix gets a node of its own.
    void close() {
        for (SuffixPoint& point : points) split(point);
        points.clear();
        const std::vector<int32_t>& ids = tree.texts[text].ids;
        int32_t size = (int32_t)ids.size();
        for (int32_t start = std::max(0, size - tree.max_depth); start < size; start++) {
            SuffixPoint end = {0, 0, false};
            while (tree.nodes[end.node].depth < size - start) {
                end.depth = tree.nodes[end.node].depth;
                tree.advance(end, ids[start + end.depth]);
            }
            tree.nodes[end.node].depth = size - start;
        }
    }

private:
    SuffixTree& tree;

    // Suffixes that have not come further than this place were counted for the whole edge; below it
    // they no longer are.
    void split(SuffixPoint& point) {
        int32_t lower = point.node, depth = point.depth;
        if (depth == tree.nodes[lower].depth) return;
        int32_t upper = tree.split(lower, depth);
        for (SuffixPoint& other : points) {
            if (other.node != lower || other.depth > depth) continue;
            other.node = upper;
            tree.nodes[lower].count -= 1;
        }
    }
};

}  // namespace folospec
