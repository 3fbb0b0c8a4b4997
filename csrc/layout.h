// Where everything lies: packed weights, what is kept for the backward, the workspace.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace trm::TRM_ISA {

// Hands out stretches of a buffer; without one it only counts. Stretches start at whole cache lines, and W floats
// past the end of each can be read.
class Arena {
public:
    explicit Arena(float* base) : base_(base) {}
    float* take(int64_t count) {
        float* stretch = base_ ? base_ + used_ : nullptr;
        used_ += round_up(count + W, 16);
        return stretch;
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
    // Rows of a batch whose channels are rows, and its positions columns.
    int64_t channels(int64_t rows) const { return tokens() ? rows / length * width : 0; }
    // Where row `row` of the batch begins there: its channels lie row_stride(length) apart.
    int64_t column(int64_t row) const { return row / length * width * row_stride(length) + row % length; }

    // A panel of `up` holds W gates and the W values that they gate.
    static int64_t panels_of_gated(int64_t inner) { return (inner + W - 1) / W; }

    int64_t width, padded, heads, head, padded_head, inner;
    int64_t up;  // columns of the MLP's first product
    int64_t length, token_inner;
    bool token_gated;
    int64_t token_up;
};

// A matrix as products read it: forward [in, out] by panels of outputs; backward [out, in] by panels of inputs.
struct PackedMatrix {
    float* forward;
    float* bias;  // whole panels
    float* backward;  // or null
};

struct PackedBlock {
    PackedMatrix qkv, out, up, down;
    float* norm1;  // of a pre-norm token mixer, whose first matrix is not applied along it
};

inline PackedMatrix lay_matrix(Arena& arena, int64_t outputs, int64_t inputs) {
    PackedMatrix m{};
    m.forward = arena.take(panels_of(outputs) * inputs * kPanel);
    m.bias = arena.take(panels_of(outputs) * kPanel);
    return m;
}

inline void lay_block(Arena& arena, const Sizes& s, PackedBlock& b) {
    if (s.tokens()) {
        b.qkv = lay_matrix(arena, s.token_up, s.length);
        b.out = lay_matrix(arena, s.length, s.token_inner);
        b.norm1 = arena.take(s.padded);
    } else {
        b.qkv = lay_matrix(arena, 3 * s.width, s.width);
        b.out = lay_matrix(arena, s.width, s.width);
    }
    b.up = lay_matrix(arena, s.up, s.width);
    b.down = lay_matrix(arena, s.width, s.inner);
}

inline void lay_block_backward(Arena& arena, const Sizes& s, PackedBlock& b) {
    if (s.tokens()) {
        b.qkv.backward = arena.take(panels_of(s.length) * s.token_up * kPanel);
        b.out.backward = arena.take(panels_of(s.token_inner) * s.length * kPanel);
    } else {
        b.qkv.backward = arena.take(panels_of(s.width) * 3 * s.width * kPanel);
        b.out.backward = arena.take(panels_of(s.width) * s.width * kPanel);
    }
    b.up.backward = arena.take(panels_of(s.width) * s.up * kPanel);
    b.down.backward = arena.take(panels_of(s.inner) * s.width * kPanel);
}

// What the backward reads of one block in one call of the network.
struct KeptBlock {
    Panels first;   // input of the QKV product: the normalised stream, or (post-norm) the stream
    float* scale1;  // of the first norm [R]
    float* qkv;     // queries, keys (both rotated) and values, by rows
    Panels mixed;   // attention's output
    float* top;     // largest scores [H, R]
    float* inverse; // of the sums of weights [H, R]
    Panels second;  // input of the MLP
    float* scale2;
    Panels up;      // what the activation reads
    Panels result;  // post-norm only: the block's output

    // Of a token mixer, whose rows are channels.
    Panels tokens;       // its input
    Panels token_up;     // what its activation reads
    Panels token_result; // post-norm: its output, normalised over positions
    float* token_scale;
};

struct KeptCall {
    float* input;       // by rows; where calls are run again
    Panels normalised;  // what the output norm's weight multiplies
    float* output_scale;
};

inline Panels lay_panels(Arena& arena, int64_t rows, int64_t columns) {
    return Panels{arena.take(Panels::size(rows, columns)), rows};
}

inline KeptBlock lay_kept_block(Arena& arena, const Network& net, const Sizes& s, int64_t rows) {
    KeptBlock k{};
    if (s.tokens()) {
        const int64_t channels = s.channels(rows);
        k.tokens = lay_panels(arena, channels, s.length);
        k.token_up = lay_panels(arena, channels, s.token_up);
        if (!net.pre_norm) {
            k.token_result = lay_panels(arena, channels, s.length);
            k.token_scale = arena.take(channels);
        }
    } else {
        k.qkv = arena.take(rows * row_stride(3 * s.width));
        k.mixed = lay_panels(arena, rows, s.width);
        k.top = arena.take(rows * s.heads);
        k.inverse = arena.take(rows * s.heads);
    }
    if (net.pre_norm || !s.tokens()) k.first = lay_panels(arena, rows, s.width);
    k.scale1 = arena.take(rows);
    k.second = lay_panels(arena, rows, s.width);
    k.scale2 = arena.take(rows);
    k.up = lay_panels(arena, rows, s.up);
    if (!net.pre_norm) k.result = lay_panels(arena, rows, s.width);
    return k;
}

inline KeptCall lay_kept_call(Arena& arena, const Sizes& s, const Recursion& r, int64_t rows, bool input) {
    KeptCall k;
    k.input = input ? arena.take(rows * row_stride(s.width)) : nullptr;
    const bool norm = r.output_eps >= 0.0f;
    k.normalised = norm ? lay_panels(arena, rows, s.width) : Panels{nullptr, rows};
    k.output_scale = norm ? arena.take(rows) : nullptr;
    return k;
}

// Samples as the kernels see them.
struct Samples {
    explicit Samples(const Batch& batch) : starts(batch.starts), count(batch.samples), longest(0), keys(0) {
        for (int64_t s = 0; s < count; ++s) {
            longest = greater(longest, length(s));
            keys += round_up(length(s), kPanel);
        }
    }
    int64_t length(int64_t s) const { return starts[s + 1] - starts[s]; }
    // The sample that row `row` belongs to.
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
    int64_t keys;  // rows of keys, filled up to whole panels a sample
};

// The scratch of one thread.
struct Scratch {
    float* partial;  // of products
    float* rows;     // a chunk [kChunkRows, width]
    float* inner;    // [kChunkRows, inner]
    float* scores;   // [kTileRows, longest]
    float* attended; // [kTileRows, padded head]
};

inline Scratch lay_scratch(Arena& arena, const Sizes& s, const Samples& samples) {
    Scratch t;
    t.partial = arena.take(kPartialSize);
    t.rows = arena.take(kChunkRows * row_stride(greater(s.width, s.length)));
    t.inner = arena.take(kChunkRows * row_stride(round_up(greater(s.inner, s.token_inner), W)));
    t.scores = arena.take(kTileRows * row_stride(samples.longest));
    t.attended = arena.take(kTileRows * s.padded_head);
    return t;
}

constexpr int64_t forward_counters(const Network& net, const Recursion& r) {
    return (2 * net.blocks + 1) * (r.steps + 1);
}
constexpr int64_t backward_counters(const Network& net, const Recursion& r) { return 5 * net.blocks * (r.steps + 1); }

// What the threads share.
struct Shared {
    float* question;   // x + y
    float* h;          // the residual stream
    float* tokens;  // a token mixer's input, then its output, channels by rows
    float* qkv;
    int64_t* first_key;  // of each sample, among Samples::keys
    float* keys[2];      // transposed, by panels of a sample's head: [H, keys / kPanel, E, kPanel]; used in turns
    float* values[2];    // by narrow panels of a sample's head: [H, R, padded head]
    int64_t* counters;   // of chunks that threads take: two a block and call, one a call
};

// Counters are laid as floats.
inline int64_t* lay_counters(Arena& arena, int64_t count) { return reinterpret_cast<int64_t*>(arena.take(2 * count)); }

inline Shared lay_shared(Arena& arena, const Network& net, const Sizes& s, const Samples& samples, const Recursion& r,
                         int64_t rows) {
    Shared b;
    b.question = arena.take(rows * row_stride(s.width));
    b.h = arena.take(rows * row_stride(s.width));
    b.tokens = arena.take(s.channels(rows) * row_stride(s.length));
    b.qkv = arena.take(s.tokens() ? 0 : rows * row_stride(3 * s.width));
    b.first_key = lay_counters(arena, samples.count);
    b.counters = lay_counters(arena, forward_counters(net, r));
    for (int turn = 0; turn < 2; ++turn) {
        b.keys[turn] = arena.take(s.tokens() ? 0 : samples.keys * s.width);
        b.values[turn] = arena.take(s.tokens() ? 0 : s.heads * rows * s.padded_head);
    }
    return b;
}

// Gradients of packed weights: dW by rows of outputs, whole panels of inputs; biases [outputs].
struct PackedGradient {
    float *weight, *bias;
    ptrdiff_t ld;
};

struct BlockGradient {
    PackedGradient qkv, out, up, down;
};

inline PackedGradient lay_gradient(Arena& arena, int64_t outputs, int64_t inputs) {
    const ptrdiff_t ld = round_up(inputs, kPanel);
    return {arena.take(outputs * ld), arena.take(outputs), ld};
}

inline BlockGradient lay_block_gradient(Arena& arena, const Sizes& s) {
    BlockGradient g;
    g.qkv = s.tokens() ? lay_gradient(arena, s.token_up, s.length) : lay_gradient(arena, 3 * s.width, s.width);
    g.out = s.tokens() ? lay_gradient(arena, s.length, s.token_inner) : lay_gradient(arena, s.width, s.width);
    g.up = lay_gradient(arena, s.up, s.width);
    g.down = lay_gradient(arena, s.width, s.inner);
    return g;
}

// What the threads share in the backward; all by rows but `inner`.
struct SharedGradient {
    float* question;  // sum of the gradients of x + y
    float* h;         // of a block's output, then of its input
    float* middle;    // of the stream between attention and MLP
    float* attended;  // of attention's output
    float* delta;     // [H, R]
    float* qkv;
    float* up;
    Panels inner;        // what the MLP's second product read
    float* tokens;       // of a token mixer's output, channels by rows
    float* token_input;  // of its input
    float* token_up;
    Panels token_inner;
    int64_t* counters;   // of items and chunks that threads take: five a block and call
    double* output_norm;  // of its weight, by threads [threads, padded width]: float sums over all rows and calls err
    double* norm1;       // of a pre-norm token mixer's norms [threads, blocks, padded width]
};

inline SharedGradient lay_shared_gradient(Arena& arena, const Network& net, const Sizes& s, const Recursion& r,
                                          int64_t rows, int threads) {
    SharedGradient g{};
    g.question = arena.take(rows * row_stride(s.width));
    g.h = arena.take(rows * row_stride(s.width));
    g.middle = arena.take(rows * row_stride(s.width));
    if (s.tokens()) {
        const int64_t channels = s.channels(rows);
        g.tokens = arena.take(channels * row_stride(s.length));
        g.token_input = arena.take(channels * row_stride(s.length));
        g.token_up = arena.take(channels * row_stride(s.token_up));
        g.token_inner = lay_panels(arena, channels, s.token_inner);
        g.norm1 = reinterpret_cast<double*>(arena.take(2 * threads * net.blocks * s.padded));
    } else {
        g.attended = arena.take(rows * row_stride(s.width));
        g.delta = arena.take(s.heads * rows);
        g.qkv = arena.take(rows * row_stride(3 * s.width));
    }
    g.up = arena.take(rows * row_stride(s.up));
    g.inner = lay_panels(arena, rows, s.inner);
    g.counters = lay_counters(arena, backward_counters(net, r));
    g.output_norm = reinterpret_cast<double*>(arena.take(2 * threads * s.padded));
    return g;
}

}  // namespace trm::TRM_ISA
