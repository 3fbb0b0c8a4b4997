// Packing of weights into the layout that products read.
#pragma once

#include "layout.h"
#include "team.h"

namespace trm::TRM_ISA {

// A matrix [outputs, inputs] of a block, whose columns are scaled by the weight of the norm before it.
struct Source {
    const float* weight;
    const float* bias;  // [outputs] or null
    const float* norm;  // [inputs] or null
    int64_t outputs, inputs;
    int64_t gated;      // 0, or F: panels alternate W of the first F outputs and the corresponding W of the others

    // The output that column `column` of the packed matrix computes, or -1 for padding.
    TRM_INLINE int64_t output(int64_t column) const {
        if (gated == 0) return column < outputs ? column : -1;
        const int64_t n = column / kPanel * W + column % W;
        return n < gated ? n + (column % kPanel >= W ? gated : 0) : -1;
    }
    int64_t columns() const { return gated ? Sizes::panels_of_gated(gated) * kPanel : outputs; }
};

struct Sources {
    Source qkv, out, up, down;
};

inline Sources sources(const Network& net, const Sizes& s, const Block& b) {
    const int64_t d = s.width, f = s.inner;
    Source first{b.qkv, b.qkv_bias, b.norm1, 3 * d, d, 0}, second{b.out, b.out_bias, nullptr, d, d, 0};
    if (s.tokens()) {
        const int64_t n = s.length, t = s.token_inner;
        first = {b.qkv, b.qkv_bias, nullptr, s.token_gated ? 2 * t : t, n, s.token_gated ? t : 0};
        second = {b.out, b.out_bias, nullptr, n, t, 0};
    }
    return {first,
            second,
            {b.up, b.up_bias, b.norm2, net.gated ? 2 * f : f, d, net.gated ? f : 0},
            {b.down, b.down_bias, nullptr, d, f, 0}};
}

// Packs panel `panel` of outputs: [inputs, kPanel].
inline void pack_forward(const Source& m, int64_t panel, PackedMatrix to) {
    float* out = to.forward + panel * m.inputs * kPanel;
    for (int half = 0; half < kPanelVectors; ++half) {
        const float* from[W];
        for (int i = 0; i < W; ++i) {
            const int64_t column = panel * kPanel + half * W + i, row = m.output(column);
            from[i] = row >= 0 ? m.weight + row * m.inputs : nullptr;
            to.bias[column] = m.bias && row >= 0 ? m.bias[row] : 0.0f;
        }
        for (int64_t k = 0; k < m.inputs; k += W) {
            const int count = static_cast<int>(min(W, m.inputs - k));
            const bool whole = count == W;
            const Vec scale = !m.norm ? splat(1.0f) : whole ? load(m.norm + k) : load_first(m.norm + k, count);
            Vec square[W];
            for (int i = 0; i < W; ++i) {
                square[i] = Vec{};
                if (from[i]) square[i] = scale * (whole ? load(from[i] + k) : load_first(from[i] + k, count));
            }
            transpose(square);
            for (int i = 0; i < count; ++i) store(out + (k + i) * kPanel + half * W, square[i]);
        }
    }
}

// Packs panel `panel` of inputs: [columns, kPanel].
inline void pack_backward(const Source& m, int64_t panel, PackedMatrix to) {
    const int64_t columns = m.columns();
    float* out = to.backward + panel * columns * kPanel;
    for (int64_t n = 0; n < columns; ++n) {
        const int64_t row = m.output(n);
        for (int j = 0; j < kPanelVectors; ++j) {
            const int64_t k = panel * kPanel + j * W;
            const int count = static_cast<int>(max(0, min(W, m.inputs - k)));
            Vec v = {};
            if (row >= 0 && count > 0) {
                const float* from = m.weight + row * m.inputs + k;
                v = count == W ? load(from) : load_first(from, count);
                if (m.norm) v *= count == W ? load(m.norm + k) : load_first(m.norm + k, count);
            }
            store(out + n * kPanel + j * W, v);
        }
    }
}

// Packs a matrix, with its panels distributed over the threads.
inline void pack_matrix(const Source& m, PackedMatrix to, const Team& team) {
    for (int64_t p = team.thread; p < panels_of(m.columns()); p += team.count) pack_forward(m, p, to);
    if (!to.backward) return;
    for (int64_t p = team.thread; p < panels_of(m.inputs); p += team.count) pack_backward(m, p, to);
}

// Computes the gradients of a matrix [outputs, inputs], its bias and its norm's weight from those of the packed matrix
// [columns, ld] and bias [columns], with the inputs distributed over the threads.
inline void finish_gradient(const Source& m, const float* packed, ptrdiff_t ld, const float* packed_bias, float* weight,
                            float* bias, float* norm, const Team& team) {
    constexpr int64_t kColumns = 128;
    const int64_t blocks = (m.inputs + kColumns - 1) / kColumns;
    for (int64_t block = team.first(blocks); block < team.last(blocks); ++block) {
        const int64_t begin = block * kColumns, count = min(kColumns, m.inputs - begin);
        // A float sum over thousands of outputs would have a larger error than autograd, which sums over rows.
        double dots[kColumns] = {};
        for (int64_t n = 0; n < m.columns(); ++n) {
            const int64_t row = m.output(n);
            if (row < 0) continue;
            const float *g = packed + n * ld + begin, *w = m.weight + row * m.inputs + begin;
            float* to = weight + row * m.inputs + begin;
            if (!norm) {
                for (int64_t k = 0; k < count; ++k) to[k] = g[k];
                continue;
            }
            for (int64_t k = 0; k < count; ++k) {
                to[k] = g[k] * m.norm[begin + k];
                dots[k] += static_cast<double>(g[k]) * w[k];
            }
        }
        for (int64_t k = 0; norm && k < count; ++k) norm[begin + k] = static_cast<float>(dots[k]);
    }
    if (bias && team.thread == 0)
        for (int64_t n = 0; n < m.outputs; ++n) bias[n] = packed_bias[n];
}

}  // namespace trm::TRM_ISA
