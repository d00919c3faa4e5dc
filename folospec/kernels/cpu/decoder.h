// A whole pass of a Llama-family decoder in one parallel region: the threads stay together and meet
// where one needs what another has made.
//
//     embed | norm | qkv | rotate, write KV | attend | output += | norm | gate, up, silu | down += | ...
//
// The residual stream is float32 whatever the weights are; activations are rounded to bfloat16 only as
// operands of bfloat16 products, and keys and values to the type of the cache.
#pragma once

#include "attention.h"
#include "team.h"

namespace folospec {

constexpr int64_t MLP_ROWS = 256;  // rows that the MLP takes at once: its scratch stays small

struct Layer {
    const float* input_norm;
    const float* query_norm;  // [head_size] or null
    const float* key_norm;
    const float* post_norm;
    Matrix qkv, output, gate_up, down;
    Pages pages;
    int64_t window;  // 0: the whole context
    int64_t skip_attention, skip_mlp;
};

struct Model {
    int64_t num_layers, hidden, inner;
    double eps;
    const void* embedding;
    int64_t embedding_format;
    const float* final_norm;
    const Layer* layers;
};

struct Pass {
    AttentionStep attention;
    const int64_t* input_ids;     // [rows]
    const int64_t* positions;     // [rows]
    const int64_t* slot_mapping;  // [rows]
    const float* cos;             // [positions, head_size / 2]
    const float* sin;
    const int32_t* window_first;  // [windows, rows] first key in the window, for layers that have one
    float* hidden;                // [rows, hidden], the result: after the final norm
    float* const* aux_hidden_states;           // [num_layers + 1] where to put the stream before a layer, or null
    float* scratch;
    int64_t threads;
};

struct Scratch {
    float* stream;   // [rows, hidden]
    float* heads;    // [rows, (heads + 2 kv_heads) head_size]
    float* input;    // [rows, max(hidden, heads * head_size)], the operand of most products
    float* gate_up;  // [MLP_ROWS, 2 inner]
    float* inner;    // [MLP_ROWS, inner], the operand of the MLP's last
};

INLINE int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }

// Lay the scratch out; from null only its size in floats is of use.
INLINE int64_t lay_out(const Model& m, const AttentionStep& a, float* base, Scratch& s) {
    int64_t at = 0, mlp_rows = std::min(a.rows, MLP_ROWS);
    auto take = [&](int64_t count) {
        float* place = base ? base + at : nullptr;
        at += padded(count);
        return place;
    };
    s.stream = take(a.rows * m.hidden);
    s.heads = take(a.rows * (a.heads + 2 * a.kv_heads) * a.head_size);
    s.input = take(a.rows * std::max(m.hidden, a.heads * a.head_size));
    s.gate_up = take(mlp_rows * 2 * m.inner);
    s.inner = take(mlp_rows * m.inner);
    return at;
}

constexpr int64_t OUT_UNIT = 24;  // outputs are shared out so that tiles of any width fit
constexpr int64_t INNER_UNIT = 48;  // and whole vectors of the MLP's inner columns besides

// y [rows, out] = x [rows, in] W^T; `room` holds the operand: rows * (in + 31) floats are enough.
INLINE void linear_rows(const Matrix& m, const float* x, void* room, int64_t rows, float* y, Member& member) {
    Operand operand = {room, padded_columns(m.in, m.format), m.format, Tiling(rows)};
    member.share(rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            OperandRow to(operand, row);
            for (int64_t i = 0; i < operand.columns; i += LANES) {
                int count = std::clamp<int64_t>(m.in - i, 0, LANES);
                to.put(i, load_up_to(x + row * m.in + i, count));
            }
        }
    });
    member.share(m.out, OUT_UNIT, [&](int64_t begin, int64_t end) {
        linear_part(m, operand, y, m.out, begin, end, false);
    });
}

class Worker {
public:
    Worker(const Model& model, const Pass& pass, const Scratch& scratch, Member& member)
        : m(model), p(pass), a(pass.attention), s(scratch), member(member), rows(pass.attention.rows) {}

    void run() {
        embed();
        for (int64_t i = 0; i < m.num_layers; i++) {
            layer(i);
            if (!m.layers[i].skip_attention) attend(m.layers[i]);
            if (!m.layers[i].skip_mlp) mlp(m.layers[i]);
        }
        layer(m.num_layers);
        norm(m.final_norm, 0, rows, {p.hidden, m.hidden, FLOAT32, Tiling(rows, true)});
    }

private:
    const Model& m;
    const Pass& p;
    const AttentionStep& a;
    const Scratch& s;
    Member& member;
    const int64_t rows;

    template <class Body>
    void each(int64_t count, Body body) {
        member.share(count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) body(i);
        });
    }

    void embed() {
        each(rows, [&](int64_t row) {
            int64_t from = p.input_ids[row] * m.hidden;
            float* to = s.stream + row * m.hidden;
            if (m.embedding_format == BFLOAT16) widen((const bfloat16*)m.embedding + from, to, m.hidden);
            else widen((const float*)m.embedding + from, to, m.hidden);
        });
    }

    void layer(int64_t layer) {
        if (!p.aux_hidden_states[layer]) return;
        member.share(rows * m.hidden, 64, [&](int64_t begin, int64_t end) {
            std::memcpy(p.aux_hidden_states[layer] + begin, s.stream + begin, (end - begin) * sizeof(float));
        });
    }

    void norm(const float* weight, int64_t first_row, int64_t count, const Operand& to) {
        each(count, [&](int64_t row) {
            rms_norm(s.stream + (first_row + row) * m.hidden, weight, m.hidden, (float)m.eps,
                     OperandRow(to, row));
        });
    }

    void linear(const Matrix& matrix, const Operand& x, float* y, bool add) {
        member.share(matrix.out, OUT_UNIT, [&](int64_t begin, int64_t end) {
            linear_part(matrix, x, y, matrix.out, begin, end, add);
        });
    }

    // Rotate a head, and write it if it is one of the keys, with the values that belong to it.
    void rotate(const Layer& layer, int64_t row, int64_t head) {
        int64_t size = a.head_size, width = (a.heads + 2 * a.kv_heads) * size;
        const float* head_norm = head < a.heads ? layer.query_norm : layer.key_norm;
        int64_t angle = p.positions[row] * (size / 2), slot = p.slot_mapping[row];
        float* from = s.heads + row * width + head * size;
        rotate_head(from, size, head_norm, (float)m.eps, p.cos + angle, p.sin + angle);
        if (head < a.heads) return;
        write_kv(a, layer.pages.key, slot, head - a.heads, 1, from);
        write_kv(a, layer.pages.value, slot, head - a.heads, 1, from + a.kv_heads * size);
    }

    void attend(const Layer& layer) {
        int64_t heads = a.heads + a.kv_heads, width = (heads + a.kv_heads) * a.head_size;
        Operand input = {s.input, m.hidden, layer.qkv.format, Tiling(rows)};
        norm(layer.input_norm, 0, rows, input);
        linear(layer.qkv, input, s.heads, false);
        each(rows * heads, [&](int64_t i) { rotate(layer, i / heads, i % heads); });
        AttentionStep step = a;
        step.first_key = layer.window ? p.window_first + (layer.window - 1) * rows : nullptr;
        Operand attended = {s.input, a.heads * a.head_size, layer.output.format, Tiling(rows)};
        attend_step(step, layer.pages, s.heads, width, attended, member);
        linear(layer.output, attended, s.stream, true);
    }

    void mlp(const Layer& layer) {
        for (int64_t first = 0; first < rows; first += MLP_ROWS) {
            int64_t count = std::min(MLP_ROWS, rows - first);
            Operand input = {s.input, m.hidden, layer.gate_up.format, Tiling(count)};
            Operand inner = {s.inner, m.inner, layer.down.format, Tiling(count)};
            norm(layer.post_norm, first, count, input);
            // A thread makes the gate and the up of the same columns, so that it can multiply them.
            member.share(m.inner, INNER_UNIT, [&](int64_t begin, int64_t end) {
                for (int64_t offset : {(int64_t)0, m.inner})
                    linear_part(layer.gate_up, input, s.gate_up, 2 * m.inner, offset + begin, offset + end, false);
                for (int64_t row = 0; row < count; row++) {
                    const float* gate = s.gate_up + row * 2 * m.inner;
                    silu_mul(gate, gate + m.inner, begin, end, OperandRow(inner, row));
                }
            });
            linear(layer.down, inner, s.stream + first * m.hidden, true);
        }
    }
};

}  // namespace folospec
