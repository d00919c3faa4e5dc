// What happens to one row on its own: norms, rotation, the gate of the MLP.
#pragma once

#include "linear.h"

namespace folospec {

// Walk `count` columns sixteen at a time; the last few go through zero-padded copies.
template <class Body>
INLINE void each_vec(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, LANES);
    if (i < count) body(i, (int)(count - i));
}

template <class T>
INLINE Vec load_up_to(const T* from, int count) {
    return count == LANES ? load(from) : load_part(from, count);
}

template <class T>
INLINE void store_up_to(T* to, Vec v, int count) {
    if (count == LANES) store(to, v);
    else store_part(to, v, count);
}

INLINE float inverse_rms(const float* x, int64_t count, float eps) {
    Vec squares = {};
    each_vec(count, [&](int64_t i, int n) {
        Vec v = load_up_to(x + i, n);
        squares = fma(v, v, squares);
    });
    return 1.0f / std::sqrt(sum(squares) / (float)count + eps);
}

// Root mean square norm of one row (Zhang, Sennrich, arXiv 1910.07467), into the operand of a product.
INLINE void rms_norm(const float* x, const float* weight, int64_t count, float eps, const OperandRow& to) {
    Vec inverse = splat(inverse_rms(x, count, eps));
    for (int64_t i = 0; i < count; i += LANES) to.put(i, load(x + i) * inverse * load(weight + i));
}

// Norm (if there is one) and rotate a head in place: halves (a, b) become (a cos - b sin, b cos + a sin).
INLINE void rotate_head(float* head, int64_t size, const float* norm, float eps, const float* cos,
                        const float* sin) {
    if (norm) {
        Vec inverse = splat(inverse_rms(head, size, eps));
        each_vec(size, [&](int64_t i, int n) {
            store_up_to(head + i, load_up_to(head + i, n) * inverse * load_up_to(norm + i, n), n);
        });
    }
    int64_t half = size / 2;
    each_vec(half, [&](int64_t i, int n) {
        Vec a = load_up_to(head + i, n), b = load_up_to(head + half + i, n);
        Vec c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
        store_up_to(head + i, a * c - b * s, n);
        store_up_to(head + half + i, b * c + a * s, n);
    });
}

INLINE Vec silu(Vec x) { return x / (exp(-x) + 1.0f); }

// silu(gate) * up for columns [begin, end) of one row, multiples of sixteen.
INLINE void silu_mul(const float* gate, const float* up, int64_t begin, int64_t end, const OperandRow& to) {
    for (int64_t i = begin; i < end; i += LANES) to.put(i, silu(load(gate + i)) * load(up + i));
}

template <class T>
INLINE void copy_converted(const float* from, T* to, int64_t count) {
    each_vec(count, [&](int64_t i, int n) { store_up_to(to + i, load_up_to(from + i, n), n); });
}

template <class T>
INLINE void widen(const T* from, float* to, int64_t count) {
    each_vec(count, [&](int64_t i, int n) { store_up_to(to + i, load_up_to(from + i, n), n); });
}

}  // namespace folospec
