// Operations on single rows: norms, activations, and copies between padded and unpadded rows.
#pragma once

#include "product.h"

namespace trm::TRM_ISA {

// Internal rows are padded with zeros to whole panels; rows of the caller end after `columns`.
TRM_INLINE void read_row(const float* from, int64_t columns, float* to) {
    const int64_t padded = round_up(columns, kPanel);
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, load(from + c));
    if (c < columns) {
        store(to + c, load_first(from + c, static_cast<int>(columns - c)));
        c += W;
    }
    for (; c < padded; c += W) store(to + c, Vec{});
}

TRM_INLINE void write_row(const float* from, int64_t columns, float* to) {
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, load(from + c));
    if (c < columns) store_first(to + c, load(from + c), static_cast<int>(columns - c));
}

// to += from; neither is accessed beyond `columns`.
TRM_INLINE void add_row(const float* from, int64_t columns, float* to) {
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, load(to + c) + load(from + c));
    if (c < columns) {
        const int left = static_cast<int>(columns - c);
        store_first(to + c, load_first(to + c, left) + load_first(from + c, left), left);
    }
}

TRM_INLINE float dot(const float* a, const float* b, int64_t padded) {
    Vec s0 = {}, s1 = {};
    for (int64_t c = 0; c < padded; c += kPanel) {
        s0 += load(a + c) * load(b + c);
        s1 += load(a + c + W) * load(b + c + W);
    }
    return sum(s0 + s1);
}

// 1 / sqrt(mean(h^2) + eps).
TRM_INLINE float norm_scale(const float* h, int64_t columns, float eps) {
    const float mean = dot(h, h, round_up(columns, kPanel)) / static_cast<float>(columns);
    return 1.0f / __builtin_sqrtf(mean + eps);
}

// Stores row `row` of a matrix in panels.
TRM_INLINE void keep_row(const float* from, int64_t columns, Panels to, int64_t row) {
    for (int64_t c = 0; c < columns; c += kPanel) {
        float* p = to.at(row, c);
        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(p + j * W, load(from + c + j * W));
    }
}

// to = scale * (d - t * mean(d * t)) + (add ? add : 0): the backward of a norm t = scale * h with output gradient d.
TRM_INLINE void norm_backward(const float* d, Panels t, int64_t row, float scale, int64_t columns, const float* add,
                              float* to) {
    Vec s0 = {}, s1 = {};
    for (int64_t c = 0; c < columns; c += kPanel) {
        const float* p = t.at(row, c);
        s0 += load(d + c) * load(p);
        s1 += load(d + c + W) * load(p + W);
    }
    const float mean = sum(s0 + s1) / static_cast<float>(columns);
    for (int64_t c = 0; c < columns; c += kPanel) {
        const float* p = t.at(row, c);
        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) {
            const Vec v = scale * (load(d + c + j * W) - load(p + j * W) * mean);
            store(to + c + j * W, add ? v + load(add + c + j * W) : v);
        }
    }
}

TRM_INLINE Vec gelu(Vec u) { return u * normal(u).cdf; }
TRM_INLINE Vec sigmoid(Vec u) { return reciprocal(1.0f + exp(-u)); }

// Rotates the heads of a row of queries or keys by its position; `sign` -1 rotates back.
TRM_INLINE void rotate_row(float* row, int64_t heads, int64_t size, const float* cos, const float* sin, float sign) {
    const int64_t half = size / 2;
    for (int64_t h = 0; h < heads; ++h) {
        float* first = row + h * size;
        float* second = first + half;
        int64_t e = 0;
        for (; e + W <= half; e += W) {
            const Vec c = load(cos + e), s = load(sin + e) * sign, a = load(first + e), b = load(second + e);
            store(first + e, a * c - b * s);
            store(second + e, b * c + a * s);
        }
        for (; e < half; ++e) {
            const float c = cos[e], s = sin[e] * sign, a = first[e], b = second[e];
            first[e] = a * c - b * s;
            second[e] = b * c + a * s;
        }
    }
}

}  // namespace trm::TRM_ISA
