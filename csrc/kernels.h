// The kernels' interface: plain numbers and addresses, one table of functions for each instruction set.
//
// Names: R rows (valid positions of all samples, one behind the other), D width, H heads, E head size (D / H),
// F inner width of the MLP.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trm {

// What a network is.
struct Network {
    int64_t width;   // D
    int64_t heads;   // H
    int64_t inner;   // F
    int64_t blocks;
    bool pre_norm;   // h + f(norm(h)), or norm(h + f(h))
    bool gated;      // SwiGLU, or GELU(erf)
    bool rotary;     // RoPE, NeoX layout
    float eps;       // of every norm of a block
    int64_t length;       // of the samples, where an MLP over positions takes the place of attention; 0: attention
    int64_t token_inner;  // inner width of that MLP: SwiGLU if post-norm, GELU with biases if pre-norm
};

// Parameters of a block, or where their gradients go; float32, contiguous, null where the network has none.
// Matrices are [out, in] as torch's; `up` holds gate and up of a SwiGLU one behind the other [2 F, D]. A token mixer's
// MLP lies in `qkv` and `out`.
struct Block {
    float* norm1;     // [D]
    float* qkv;       // [3 D, D]
    float* qkv_bias;  // [3 D]
    float* out;       // [D, D]
    float* out_bias;  // [D]
    float* norm2;     // [D]
    float* up;        // [F or 2 F, D]
    float* up_bias;   // [F]
    float* down;      // [D, F]
    float* down_bias; // [D]
};
constexpr int kBlockTensors = 10;
constexpr int64_t kMostBlocks = 64;

// Memory of any content.
struct Span {
    const char* data;
    int64_t bytes;
};

// A batch: `samples` stretches of rows, sample s from starts[s] to starts[s + 1].
struct Batch {
    int64_t rows;           // R
    int64_t samples;
    const int32_t* starts;  // [samples + 1]
    const float* cos;       // RoPE tables [longest, E / 2], by position
    const float* sin;
    const int32_t* positions;  // Position of each row in its sample [R]; null: its place there
};

// n times z = net(x + y + z), then y = net(y + z); or, without x and z, y = net(y).
struct Recursion {
    int64_t steps;              // n
    const float* x;             // [R, D]; null if n is 0
    const float* y;             // [R, D]
    const float* z;             // [R, D]; null if n is 0 and y alone goes in
    const float* output_norm;   // weight [D] of a norm behind every call of the network
    float output_eps;           // negative: no such norm (it may have no weight)
    float dropout;              // probability of dropping an attention weight
    uint64_t seed;
    bool recompute;             // keep the inputs of calls alone, and run each call again in the backward
};

struct Kernels {
    const char* name;
    int vector;  // floats in a register

    // Sizes are in floats.
    int64_t (*packed_size)(const Network&, bool backward);
    int64_t (*kept_size)(const Network&, const Batch&, const Recursion&);
    int64_t (*workspace_size)(const Network&, const Batch&, const Recursion&, bool backward, int threads);

    // Weights as the kernels read them: panels, norm weights folded in; `backward`: those of the backward too.
    void (*pack)(const Network&, const Block*, bool backward, float* packed, int threads);
    // Two digests of all the spans go to `digests`, which holds digest_size() of them: the same for any number of
    // threads and any instruction set.
    void (*digest)(const Span* spans, int64_t count, uint64_t* digests, int threads);
    int64_t (*digest_size)(const Span* spans, int64_t count);
    // `kept`: what the backward will read, or null. `z_out` is written if n > 0.
    void (*forward)(const Network&, const Batch&, const Recursion&, const float* packed, float* kept,
                    float* workspace, float* y_out, float* z_out, int threads);
    // Gradients of inputs and parameters; dx, dz, dz_out, and output_norm's may be null.
    void (*backward)(const Network&, const Batch&, const Recursion&, const Block* parameters,
                     const float* packed, const float* kept, float* workspace, const float* dy_out,
                     const float* dz_out, float* dx, float* dy, float* dz, const Block* gradients,
                     float* output_norm_gradient, int threads);
    // Kept attention weights are 1, dropped ones 0: [rows, rows] of one head of one call (tests compare with it).
    void (*dropout_mask)(const Recursion&, int64_t call_block, int64_t head, int64_t first_row, int64_t rows,
                         float* mask);
    // GF/s of independent multiply-adds in registers, on each of `threads` threads at once.
    double (*fma_peak)(double seconds, int threads);
    // Of the micro-kernel on data in the first-level cache, likewise.
    double (*tile_rate)(double seconds, int threads);
};

// The best instruction set that both this build and this machine have; `name`: a given one, or null if it lacks.
const Kernels* kernels();
const Kernels* kernels(const char* name);

}  // namespace trm
