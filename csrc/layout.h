// Memory layout of packed weights, of the data kept for the backward, and of the workspace.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace trm::TRM_ISA {

// Allocates ranges of a buffer; without a buffer it only counts. Ranges are aligned to cache lines, and W floats beyond
// the end of each are readable.
class Arena {
public:
    explicit Arena(float* base) : base_(base) {}
    float* allocate(int64_t count) {
        float* range = base_ ? base_ + used_ : nullptr;
        used_ += round_up(count + W, 16);
        return range;
    }
    int64_t used() const { return used_; }

private:
    float* base_;
    int64_t used_ = 0;
};

// Widths of a network's activations.
struct Sizes {
    explicit Sizes(const Network& net)
        : width(net.width),
          padded(round_up(net.width, kPanel)),
          heads(net.heads),
          head(net.width / net.heads),
          padded_head(round_up(head, W)),
          inner(net.inner),
          up(net.gated ? panels_of_gated(net.inner) * kPanel : net.inner),
          length(net.length),
          token_inner(net.token_inner),
          token_gated(!net.pre_norm),
          token_up(token_gated ? panels_of_gated(net.token_inner) * kPanel : net.token_inner) {}

    bool tokens() const { return length > 0; }
    // Number of rows of the transposed batch, whose rows are channels and whose columns are positions.
    int64_t channels(int64_t rows) const { return tokens() ? rows / length * width : 0; }
    // Offset of row `row` of the batch in the transposed batch; its channels are row_stride(length) apart.
    int64_t column(int64_t row) const { return row / length * width * row_stride(length) + row % length; }

    // A panel of `up` holds W gates and the W values that they multiply.
    static int64_t panels_of_gated(int64_t inner) { return (inner + W - 1) / W; }

    int64_t width, padded, heads, head, padded_head, inner;
    int64_t up;  // number of columns of the MLP's first product
    int64_t length, token_inner;
    bool token_gated;
    int64_t token_up;
};

// A matrix in the layout that products read: forward [in, out] in panels of outputs; backward [out, in] in panels of
// inputs.
struct PackedMatrix {
    float* forward;
    float* bias;  // whole panels
    float* backward;  // or null
};

struct PackedBlock {
    PackedMatrix qkv, out, up, down;
    float* norm1;  // only for a pre-norm token mixer, where it cannot be folded into the first matrix
};

inline PackedMatrix lay_out_matrix(Arena& arena, int64_t outputs, int64_t inputs) {
    PackedMatrix m{};
    m.forward = arena.allocate(panels_of(outputs) * inputs * kPanel);
    m.bias = arena.allocate(panels_of(outputs) * kPanel);
    return m;
}

inline void lay_out_block(Arena& arena, const Sizes& s, PackedBlock& b) {
    if (s.tokens()) {
        b.qkv = lay_out_matrix(arena, s.token_up, s.length);
        b.out = lay_out_matrix(arena, s.length, s.token_inner);
        b.norm1 = arena.allocate(s.padded);
    } else {
        b.qkv = lay_out_matrix(arena, 3 * s.width, s.width);
        b.out = lay_out_matrix(arena, s.width, s.width);
    }
    b.up = lay_out_matrix(arena, s.up, s.width);
    b.down = lay_out_matrix(arena, s.width, s.inner);
}

inline void lay_out_block_backward(Arena& arena, const Sizes& s, PackedBlock& b) {
    if (s.tokens()) {
        b.qkv.backward = arena.allocate(panels_of(s.length) * s.token_up * kPanel);
        b.out.backward = arena.allocate(panels_of(s.token_inner) * s.length * kPanel);
    } else {
        b.qkv.backward = arena.allocate(panels_of(s.width) * 3 * s.width * kPanel);
        b.out.backward = arena.allocate(panels_of(s.width) * s.width * kPanel);
    }
    b.up.backward = arena.allocate(panels_of(s.width) * s.up * kPanel);
    b.down.backward = arena.allocate(panels_of(s.inner) * s.width * kPanel);
}

// Data of one block in one call of the network, kept for the backward.
struct KeptBlock {
    Panels first;   // input of the QKV product: the normalised stream, or if post-norm, the stream
    float* scale1;  // scales of the first norm [R]
    float* qkv;     // rows of queries, keys (both rotated) and values
    Panels mixed;   // attention output
    float* maxima;  // maximum scores [H, R]
    float* inverses; // inverse sums of weights [H, R]
    Panels second;  // input of the MLP
    float* scale2;  // scales of the second norm [R]
    Panels up;      // input of the activation
    Panels result;  // output of the block, if post-norm

    // Only for a token mixer, whose rows are channels.
    Panels tokens;       // its input
    Panels token_up;     // input of its activation
    Panels token_result; // its output, normalised over positions, if post-norm
    float* token_scale;
};

struct KeptCall {
    float* input;       // rows, if calls are recomputed
    Panels normalised;  // output of the output norm before its weight
    float* output_scale;
};

inline Panels lay_out_panels(Arena& arena, int64_t rows, int64_t columns) {
    return Panels{arena.allocate(Panels::size(rows, columns)), rows};
}

inline KeptBlock lay_out_kept_block(Arena& arena, const Network& net, const Sizes& s, int64_t rows) {
    KeptBlock k{};
    if (s.tokens()) {
        const int64_t channels = s.channels(rows);
        k.tokens = lay_out_panels(arena, channels, s.length);
        k.token_up = lay_out_panels(arena, channels, s.token_up);
        if (!net.pre_norm) {
            k.token_result = lay_out_panels(arena, channels, s.length);
            k.token_scale = arena.allocate(channels);
        }
    } else {
        k.qkv = arena.allocate(rows * row_stride(3 * s.width));
        k.mixed = lay_out_panels(arena, rows, s.width);
        k.maxima = arena.allocate(rows * s.heads);
        k.inverses = arena.allocate(rows * s.heads);
    }
    if (net.pre_norm || !s.tokens()) k.first = lay_out_panels(arena, rows, s.width);
    k.scale1 = arena.allocate(rows);
    k.second = lay_out_panels(arena, rows, s.width);
    k.scale2 = arena.allocate(rows);
    k.up = lay_out_panels(arena, rows, s.up);
    if (!net.pre_norm) k.result = lay_out_panels(arena, rows, s.width);
    return k;
}

inline KeptCall lay_out_kept_call(Arena& arena, const Sizes& s, const Recursion& r, int64_t rows, bool input) {
    KeptCall k;
    k.input = input ? arena.allocate(rows * row_stride(s.width)) : nullptr;
    const bool norm = r.output_eps >= 0.0f;
    k.normalised = norm ? lay_out_panels(arena, rows, s.width) : Panels{nullptr, rows};
    k.output_scale = norm ? arena.allocate(rows) : nullptr;
    return k;
}

// The samples of a batch, with their lengths and totals.
struct Samples {
    explicit Samples(const Batch& batch) : starts(batch.starts), count(batch.samples), longest(0), keys(0) {
        for (int64_t s = 0; s < count; ++s) {
            longest = max(longest, length(s));
            keys += round_up(length(s), kPanel);
        }
    }
    int64_t length(int64_t s) const { return starts[s + 1] - starts[s]; }
    // Index of the sample that contains row `row`.
    int64_t of(int64_t row) const {
        int64_t low = 0, high = count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (starts[middle] <= row ? low : high) = middle;
        }
        return low;
    }

    const int32_t* starts;
    int64_t count, longest;
    int64_t keys;  // number of key rows, padded to whole panels per sample
};

// The scratch of one thread.
struct Scratch {
    float* partial;  // partial sums of products
    float* rows;     // one chunk [kChunkRows, width]
    float* inner;    // [kChunkRows, inner]
    float* scores;   // [kTileRows, longest]
    float* attended; // [kTileRows, padded head]
};

inline Scratch lay_out_scratch(Arena& arena, const Sizes& s, const Samples& samples) {
    Scratch t;
    t.partial = arena.allocate(kPartialSize);
    t.rows = arena.allocate(kChunkRows * row_stride(max(s.width, s.length)));
    t.inner = arena.allocate(kChunkRows * row_stride(round_up(max(s.inner, s.token_inner), W)));
    t.scores = arena.allocate(kTileRows * row_stride(samples.longest));
    t.attended = arena.allocate(kTileRows * s.padded_head);
    return t;
}

constexpr int64_t forward_counters(const Network& net, const Recursion& r) {
    return (2 * net.blocks + 1) * (r.steps + 1);
}
constexpr int64_t backward_counters(const Network& net, const Recursion& r) { return 5 * net.blocks * (r.steps + 1); }

// Buffers shared by the threads.
struct Shared {
    float* question;   // x + y
    float* h;          // the residual stream
    float* tokens;  // a token mixer's input, then its output; rows are channels
    float* qkv;
    int64_t* first_key;  // index of each sample's first key among Samples::keys
    float* keys[2];      // transposed, in panels per sample and head: [H, keys / kPanel, E, kPanel]; used alternately
    float* values[2];    // in narrow panels per sample and head: [H, R, padded head]
    int64_t* counters;   // for dynamic chunks: two per block and call, one per call
};

// Counters are allocated as floats.
inline int64_t* lay_out_counters(Arena& arena, int64_t count) {
    return reinterpret_cast<int64_t*>(arena.allocate(2 * count));
}

inline Shared lay_out_shared(Arena& arena, const Network& net, const Sizes& s, const Samples& samples,
                             const Recursion& r, int64_t rows) {
    Shared b;
    b.question = arena.allocate(rows * row_stride(s.width));
    b.h = arena.allocate(rows * row_stride(s.width));
    b.tokens = arena.allocate(s.channels(rows) * row_stride(s.length));
    b.qkv = arena.allocate(s.tokens() ? 0 : rows * row_stride(3 * s.width));
    b.first_key = lay_out_counters(arena, samples.count);
    b.counters = lay_out_counters(arena, forward_counters(net, r));
    for (int i = 0; i < 2; ++i) {
        b.keys[i] = arena.allocate(s.tokens() ? 0 : samples.keys * s.width);
        b.values[i] = arena.allocate(s.tokens() ? 0 : s.heads * rows * s.padded_head);
    }
    return b;
}

// Gradients of packed weights: dW with rows of outputs, padded to whole panels of inputs; biases [outputs].
struct PackedGradient {
    float *weight, *bias;
    ptrdiff_t ld;
};

struct BlockGradient {
    PackedGradient qkv, out, up, down;
};

inline PackedGradient lay_out_gradient(Arena& arena, int64_t outputs, int64_t inputs) {
    const ptrdiff_t ld = round_up(inputs, kPanel);
    return {arena.allocate(outputs * ld), arena.allocate(outputs), ld};
}

inline BlockGradient lay_out_block_gradient(Arena& arena, const Sizes& s) {
    BlockGradient g;
    g.qkv = s.tokens() ? lay_out_gradient(arena, s.token_up, s.length) : lay_out_gradient(arena, 3 * s.width, s.width);
    g.out = s.tokens() ? lay_out_gradient(arena, s.length, s.token_inner) : lay_out_gradient(arena, s.width, s.width);
    g.up = lay_out_gradient(arena, s.up, s.width);
    g.down = lay_out_gradient(arena, s.width, s.inner);
    return g;
}

// Buffers shared by the threads in the backward. All are stored in rows, except those of type Panels.
struct SharedGradient {
    float* question;  // sum of the gradients of x + y
    float* h;         // gradient of a block's output, then of its input
    float* middle;    // gradient of the stream between attention and MLP
    float* attended;  // gradient of the attention output
    float* delta;     // [H, R]
    float* qkv;
    float* up;
    Panels inner;        // input of the MLP's second product
    float* tokens;       // gradient of a token mixer's output; rows are channels
    float* token_input;  // gradient of its input
    float* token_up;
    Panels token_inner;
    int64_t* counters;   // for dynamic items and chunks: five per block and call
    double* output_norm;  // gradient of its weight per thread [threads, padded width], double for precision
    double* norm1;       // gradients of a pre-norm token mixer's norms [threads, blocks, padded width]
};

inline SharedGradient lay_out_shared_gradient(Arena& arena, const Network& net, const Sizes& s, const Recursion& r,
                                          int64_t rows, int threads) {
    SharedGradient g{};
    g.question = arena.allocate(rows * row_stride(s.width));
    g.h = arena.allocate(rows * row_stride(s.width));
    g.middle = arena.allocate(rows * row_stride(s.width));
    if (s.tokens()) {
        const int64_t channels = s.channels(rows);
        g.tokens = arena.allocate(channels * row_stride(s.length));
        g.token_input = arena.allocate(channels * row_stride(s.length));
        g.token_up = arena.allocate(channels * row_stride(s.token_up));
        g.token_inner = lay_out_panels(arena, channels, s.token_inner);
        g.norm1 = reinterpret_cast<double*>(arena.allocate(2 * threads * net.blocks * s.padded));
    } else {
        g.attended = arena.allocate(rows * row_stride(s.width));
        g.delta = arena.allocate(s.heads * rows);
        g.qkv = arena.allocate(rows * row_stride(3 * s.width));
    }
    g.up = arena.allocate(rows * row_stride(s.up));
    g.inner = lay_out_panels(arena, rows, s.inner);
    g.counters = lay_out_counters(arena, backward_counters(net, r));
    g.output_norm = reinterpret_cast<double*>(arena.allocate(2 * threads * s.padded));
    return g;
}

}  // namespace trm::TRM_ISA
