// Interface of the kernels: plain numbers and addresses, with one table of functions per instruction set.
//
// Names: R rows (the valid positions of all samples, one after another), D width, H heads, E head size (D / H), F inner
// width of the MLP.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trm {

// Shape and type of a network.
struct Network {
    int64_t width;   // D
    int64_t heads;   // H
    int64_t inner;   // F
    int64_t blocks;
    bool pre_norm;   // true: h + f(norm(h)), false: norm(h + f(h))
    bool gated;      // true: SwiGLU, false: GELU(erf)
    bool rotary;     // RoPE, NeoX layout
    float eps;       // epsilon of every norm of a block
    int64_t length;       // length of the samples if an MLP over positions replaces attention; 0: attention
    int64_t token_inner;  // inner width of that MLP: SwiGLU if post-norm, GELU with biases if pre-norm
};

// Parameters of a block, or their gradients: float32, contiguous, null if the network does not have them. Matrices are
// [out, in] as in torch; `up` holds gate and up of a SwiGLU one after the other [2 F, D]. `qkv` and `out` hold the MLP
// of a token mixer.
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
constexpr int64_t kMaxBlocks = 64;

// A range of memory with any content.
struct Span {
    const char* data;
    int64_t bytes;
};

// A batch of `samples` row ranges: sample s has the rows starts[s] to starts[s + 1].
struct Batch {
    int64_t rows;           // R
    int64_t samples;
    const int32_t* starts;  // [samples + 1]
    const float* cos;       // RoPE tables [longest, E / 2], by position
    const float* sin;
    const int32_t* positions;  // position of each row in its sample [R]; null: rows are consecutive positions
};

// z = net(x + y + z) n times, then y = net(y + z); without x and z, y = net(y).
struct Recursion {
    int64_t steps;              // n
    const float* x;             // [R, D]; null if n is 0
    const float* y;             // [R, D]
    const float* z;             // [R, D]; null if n is 0 and only y is an input
    const float* output_norm;   // weight [D] of a norm after every call of the network; null: the norm has no weight
    float output_eps;           // epsilon of that norm; negative: no norm
    float dropout;              // probability of dropping an attention weight
    uint64_t seed;
    bool recompute;             // keep only the inputs of calls, and run each call again in the backward
};

struct Kernels {
    const char* name;
    int vector;  // number of floats per register

    // Sizes are in floats.
    int64_t (*packed_size)(const Network&, bool backward);
    int64_t (*kept_size)(const Network&, const Batch&, const Recursion&);
    int64_t (*workspace_size)(const Network&, const Batch&, const Recursion&, bool backward, int threads);

    // Packs weights in the layout that the kernels read: panels with folded norm weights; if `backward`, also the
    // matrices of the backward.
    void (*pack)(const Network&, const Block*, bool backward, float* packed, int threads);
    // Writes two digests of all spans to the start of `digests`, a buffer of digest_size() elements. They do not depend
    // on the number of threads or the instruction set.
    void (*digest)(const Span* spans, int64_t count, uint64_t* digests, int threads);
    int64_t (*digest_size)(const Span* spans, int64_t count);
    // `kept` receives the data for the backward, unless null. `z_out` is written if n > 0.
    void (*forward)(const Network&, const Batch&, const Recursion&, const float* packed, float* kept,
                    float* workspace, float* y_out, float* z_out, int threads);
    // Computes the gradients of inputs and parameters. dx, dz, dz_out and output_norm_gradient may be null.
    void (*backward)(const Network&, const Batch&, const Recursion&, const Block* parameters,
                     const float* packed, const float* kept, float* workspace, const float* dy_out,
                     const float* dz_out, float* dx, float* dy, float* dz, const Block* gradients,
                     float* output_norm_gradient, int threads);
    // Writes the dropout mask [rows, rows] of one head of one call, 1 for kept attention weights, for tests.
    void (*dropout_mask)(const Recursion&, int64_t call_block, int64_t head, int64_t first_row, int64_t rows,
                         float* mask);
    // Measures GF/s of independent multiply-adds in registers, on `threads` threads at once.
    double (*fma_peak)(double seconds, int threads);
    // Measures the micro-kernel on data in the L1 cache in the same way.
    double (*tile_rate)(double seconds, int threads);
};

// The kernels of the best instruction set that this build and this machine support, or those of the instruction set
// `name`, null if unsupported.
const Kernels* kernels();
const Kernels* kernels(const char* name);

}  // namespace trm
