// The native CPU kernels: plain functions over data pointers, for ctypes. Every one has a form in torch or
// in Python that it is tested against. They trust their caller: kernels/checked.py looks first. `threads` is
// torch's own number, and the threads are torch's own OpenMP's: a second runtime would spin against it.
#include "chains.h"
#include "sampling.h"
#include "suffix.h"

using namespace folospec;

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the caller's structs must measure.
EXPORT void folospec_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Matrix);
    sizes[1] = sizeof(AttentionStep);
    sizes[2] = sizeof(Layer);
    sizes[3] = sizeof(Model);
    sizes[4] = sizeof(Pass);
    sizes[5] = sizeof(Chains);
}

// What this build computes with.
EXPORT const char* folospec_instruction_set() { return instruction_set(); }

EXPORT int64_t folospec_scratch_floats(const Model* model, const Pass* pass) {
    Scratch s;
    return lay_out(*model, pass->attention, nullptr, s);
}

// The decoder over all rows of a step: writes their KV and `pass->hidden`.
EXPORT void folospec_forward(const Model* model, const Pass* pass) {
    Scratch s;
    lay_out(*model, pass->attention, pass->scratch, s);
    together(pass->threads, [&](Member& member) { Worker(*model, *pass, s, member).run(); });
}

// y [rows, out] = x [rows, in] W^T; `room` holds the operand: rows * (in + 31) floats are enough.
EXPORT void folospec_linear(const Matrix* m, const float* x, void* room, int64_t rows, float* y,
                            int64_t threads) {
    together(threads, [&](Member& member) { linear_rows(*m, x, room, rows, y, member); });
}

// Draw chains of tokens, and run all of each but its last; returns the passes that were made.
EXPORT int64_t folospec_chains(const Model* model, const Chains* job) {
    ChainWorker worker(*model, *job);
    together(job->threads, [&](Member& member) { worker.run(member); });
    return worker.num_passes();
}

EXPORT int64_t folospec_chain_floats(const Model* model, const Chains* job) {
    return ChainWorker::scratch_floats(*model, *job);
}

// Write the rows' keys and values, [rows, kv_heads, head_size], then attend: out [rows, heads, head_size].
EXPORT void folospec_attention(const AttentionStep* step, const Pages* pages, const float* queries,
                               const float* keys, const float* values, const int64_t* slot_mapping,
                               float* out, int64_t threads) {
    int64_t kv_width = step->kv_heads * step->head_size, width = step->heads * step->head_size;
    Operand rows = {out, width, FLOAT32, Tiling(step->rows, true)};
    together(threads, [&](Member& member) {
        member.share(step->rows, 1, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) {
                write_kv(*step, pages->key, slot_mapping[row], 0, step->kv_heads, keys + row * kv_width);
                write_kv(*step, pages->value, slot_mapping[row], 0, step->kv_heads, values + row * kv_width);
            }
        });
        attend_step(*step, *pages, queries, width, rows, member);
    });
}

EXPORT void folospec_rms_norm(const float* x, const float* weight, int64_t rows, int64_t size, double eps,
                              float* out) {
    Operand to = {out, size, FLOAT32, Tiling(rows, true)};
    for (int64_t row = 0; row < rows; row++)
        rms_norm(x + row * size, weight, size, (float)eps, OperandRow(to, row));
}

EXPORT void folospec_rotate(float* heads, const float* cos, const float* sin, int64_t rows,
                            int64_t heads_per_row, int64_t size) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads_per_row; head++)
            rotate_head(heads + (row * heads_per_row + head) * size, size, nullptr, 0,
                        cos + row * (size / 2), sin + row * (size / 2));
}

EXPORT void folospec_silu_mul(const float* gate_up, int64_t rows, int64_t inner, float* out) {
    Operand to = {out, inner, FLOAT32, Tiling(rows, true)};
    for (int64_t row = 0; row < rows; row++) {
        const float* gate = gate_up + row * 2 * inner;
        silu_mul(gate, gate + inner, 0, inner, OperandRow(to, row));
    }
}

// Move rows of `bytes` each to other slots, in several tensors. All of a tensor's rows are read, into
// `held` [count * bytes], before one is written: the lists may overlap.
EXPORT void folospec_move_rows(void* const* tensors, const int64_t* bytes, int64_t num_tensors,
                               const int64_t* sources, const int64_t* targets, int64_t count, char* held) {
    for (int64_t t = 0; t < num_tensors; t++) {
        char* base = (char*)tensors[t];
        for (int64_t i = 0; i < count; i++) std::memcpy(held + i * bytes[t], base + sources[i] * bytes[t], bytes[t]);
        for (int64_t i = 0; i < count; i++) std::memcpy(base + targets[i] * bytes[t], held + i * bytes[t], bytes[t]);
    }
}

// Read `count` floats and return their sum: what memory gives at best.
EXPORT float folospec_read(const float* from, int64_t count, int64_t threads) {
    std::atomic<float> total{0};
    together(threads, [&](Member& member) {
        member.share(count / 64, 1, [&](int64_t begin, int64_t end) {
            Vec sums[4] = {};
            for (int64_t i = begin * 64; i < end * 64; i += 64) {
                for (int v = 0; v < 64 / LANES; v++) sums[v % 4] = sums[v % 4] + load(from + i + v * LANES);
                for (int line = 0; line < 4; line++)
                    __builtin_prefetch((const char*)(from + i) + line * LINE_BYTES + AHEAD_BYTES, 0, 2);
            }
            float own = sum((sums[0] + sums[1]) + (sums[2] + sums[3])), before = total;
            while (!total.compare_exchange_weak(before, before + own)) {}
        });
    });
    return total;
}
