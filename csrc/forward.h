// Forward of a network on packed rows, by one thread of a team. The thread computes products, norms and activations of
// its own rows, with one barrier per block before attention reads the keys and values of all rows (or two barriers,
// around an MLP over positions).
#pragma once

#include "attention.h"
#include "pack.h"

namespace trm::TRM_ISA {

// Arguments of every call of a network, the same for all threads.
struct Problem {
    Problem(const Network& n, const Batch& b, const Recursion& r)
        : net(n), batch(b), recursion(r), sizes(n), samples(b) {}

    const Network& net;
    const Batch& batch;
    const Recursion& recursion;
    Sizes sizes;
    Samples samples;
};

// Rotates heads [first, last) of queries and keys in row `row` of qkv by the row's position; `index` is its index in
// its sample. `sign` -1 rotates back.
inline void rotate_heads(const Problem& p, float* qkv, int64_t row, int64_t index, int64_t first, int64_t last,
                         float sign) {
    const Sizes& s = p.sizes;
    const int64_t table = (p.batch.positions ? p.batch.positions[row] : index) * (s.head / 2);
    for (int part = 0; part < 2; ++part) {
        float* heads = qkv + row * row_stride(3 * s.width) + part * s.width + first * s.head;
        rotate_row(heads, last - first, s.head, p.batch.cos + table, p.batch.sin + table, sign);
    }
}

class Forward {
public:
    Forward(const Problem& problem, const PackedBlock* blocks, const Shared& shared, const Scratch& scratch, Team team)
        : p_(problem), s_(problem.sizes), blocks_(blocks), shared_(shared), t_(scratch), team_(team),
          row_schedule_(team, problem.batch.rows, kChunkRows),
          channel_schedule_(team, problem.sizes.channels(problem.batch.rows), kChunkRows) {}

    // Computes net(h) in place, for the rows of all threads. `kept` [blocks] and `kept_call` may be null. Before and
    // after the call, a thread may access only its own rows.
    void call(int64_t index, const KeptBlock* kept, const KeptCall* kept_call) {
        if (row_schedule_.dynamic) team_.wait();
        int64_t* counter = shared_.counters + index * (2 * p_.net.blocks + 1);
        row_schedule_.chunks(counter++, [&](int64_t first, int64_t last) { prepare_mixer(0, kept, first, last); });
        for (int64_t b = 0; b < p_.net.blocks; ++b) {
            team_.wait();
            const int64_t buffer = buffer_;
            buffer_ ^= 1;
            if (s_.tokens()) {
                channel_schedule_.chunks(
                    counter, [&](int64_t first, int64_t last) { apply_token_mixer(b, kept, first, last); });
                team_.wait();
            }
            row_schedule_.chunks(counter + 1, [&](int64_t first, int64_t last) {
                if (s_.tokens()) {
                    channels_to_rows(first, last);
                } else {
                    add_attention(b, index * p_.net.blocks + b, buffer, kept, first, last);
                }
                add_mlp(b, kept, first, last);
                if (b + 1 < p_.net.blocks) prepare_mixer(b + 1, kept, first, last);
            });
            counter += 2;
        }
        if (row_schedule_.dynamic) team_.wait();
        if (p_.recursion.output_eps >= 0.0f) normalise_output(kept_call);
    }

    // The rows that this thread owns between calls.
    int64_t first() const { return team_.first(p_.batch.rows); }
    int64_t last() const { return team_.last(p_.batch.rows); }
    float* h(int64_t row) const { return shared_.h + row * row_stride(s_.width); }

private:
    // Prepares these rows for a block's mixer; all threads may read the result after the next barrier.
    void prepare_mixer(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        s_.tokens() ? rows_to_channels(block, kept, first, last) : project(block, kept, first, last);
    }

    // Computes queries, keys and values of a block. All threads may read keys and values after the next barrier.
    void project(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width), ldqkv = row_stride(3 * s_.width);
        const PackedMatrix& m = blocks_[block].qkv;
        const float* input =
            kept ? block_input(first, last, kept[block].scale1, &kept[block].first) : block_input(first, last);
        float* qkv = kept ? kept[block].qkv : shared_.qkv;
        product(last - first, s_.width, input, ld, m.forward, panels_of(3 * s_.width), t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) {
                    float* to = qkv + (first + i) * ldqkv + panel * kPanel;
                    const float* bias = m.bias + panel * kPanel;
                    TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(to + j * W, v[j] + load(bias + j * W));
                });
        if (p_.net.rotary) rotate(qkv, first, last);
        pack_keys_and_values(s_, p_.samples, attention_input(qkv, buffer_, 0), first, last);
    }

    // Adds the attention of a block to the stream.
    void add_attention(int64_t block, int64_t call, int64_t buffer, const KeptBlock* kept, int64_t first,
                       int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width);
        const float* qkv = kept ? kept[block].qkv : shared_.qkv;
        attend(s_, p_.samples, attention_input(qkv, buffer, call), first, last, t_, t_.rows, ld,
               kept ? kept[block].maxima : nullptr, kept ? kept[block].inverses : nullptr);
        for (int64_t r = first; r < last; ++r) {
            float* row = t_.rows + (r - first) * ld;
            for (int64_t c = s_.width; c < s_.padded; ++c) row[c] = 0.0f;
            if (kept) keep_row(row, s_.width, kept[block].mixed, r);
        }
        add_product(blocks_[block].out, s_.width, t_.rows, ld, first, last);
        if (!p_.net.pre_norm) normalise_stream(kept ? kept[block].scale1 : nullptr, first, last);
    }

    // Adds the MLP of a block to the stream.
    void add_mlp(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width), ldinner = row_stride(round_up(s_.inner, W));
        const PackedMatrix& m = blocks_[block].up;
        const float* input =
            kept ? block_input(first, last, kept[block].scale2, &kept[block].second) : block_input(first, last);
        up_project({m, s_.width, s_.up, ldinner, p_.net.gated}, input, ld, first, last,
                   kept ? &kept[block].up : nullptr);
        add_product(blocks_[block].down, s_.inner, t_.inner, ldinner, first, last);
        if (p_.net.pre_norm) return;
        normalise_stream(kept ? kept[block].scale2 : nullptr, first, last);
        if (kept)
            for (int64_t r = first; r < last; ++r) keep_row(h(r), s_.width, kept[block].result, r);
    }

    struct UpProjection {
        const PackedMatrix& matrix;
        int64_t depth, columns;
        ptrdiff_t ldinner;
        bool gated;
    };

    // Writes the inner rows of an MLP to the scratch: the activation of input @ matrix + bias.
    void up_project(const UpProjection& m, const float* input, ptrdiff_t ld, int64_t first, int64_t last,
                    const Panels* kept) {
        product(last - first, m.depth, input, ld, m.matrix.forward, panels_of(m.columns), t_.partial,
                [&](int64_t i, int64_t panel, Vec* v) {
                    const float* bias = m.matrix.bias + panel * kPanel;
                    TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) v[j] += load(bias + j * W);
                    if (kept) {
                        float* to = kept->at(first + i, panel * kPanel);
                        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(to + j * W, v[j]);
                    }
                    float* to = t_.inner + i * m.ldinner;
                    if (m.gated) {
                        store(to + panel * W, v[0] * sigmoid(v[0]) * v[1]);
                    } else {
                        to += panel * kPanel;
                        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(to + j * W, gelu(v[j]));
                    }
                });
    }

    // Writes these rows, normalised if pre-norm, as columns of a token mixer's input.
    void rows_to_channels(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width), ldtokens = row_stride(s_.length);
        const float* input = h(first);
        if (p_.net.pre_norm) {
            normalise(first, last, kept ? kept[block].scale1 : nullptr);
            for (int64_t r = first; r < last; ++r) {
                float* row = t_.rows + (r - first) * ld;
                if (kept) keep_row(row, s_.width, kept[block].first, r);
                const float* weight = blocks_[block].norm1;
                for (int64_t c = 0; c < s_.padded; c += W) store(row + c, load(row + c) * load(weight + c));
            }
            input = t_.rows;
        }
        for (int64_t r = first; r < last; ++r) {
            const float* row = input + (r - first) * ld;
            float* to = shared_.tokens + s_.column(r);
            for (int64_t c = 0; c < s_.width; ++c) to[c * ldtokens] = row[c];
        }
    }

    // Applies the MLP over positions to channels [first, last); if post-norm, including residual and norm.
    void apply_token_mixer(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.length), ldinner = row_stride(round_up(s_.token_inner, W));
        const int64_t padded = round_up(s_.length, kPanel);
        const PackedBlock& m = blocks_[block];
        const auto row = [&](int64_t r) { return shared_.tokens + r * ld; };
        for (int64_t r = first; r < last; ++r) {
            for (int64_t c = s_.length; c < padded; ++c) row(r)[c] = 0.0f;
            if (kept) keep_row(row(r), s_.length, kept[block].tokens, r);
        }
        up_project({m.qkv, s_.length, s_.token_up, ldinner, s_.token_gated}, row(first), ld, first, last,
               kept ? &kept[block].token_up : nullptr);
        product(last - first, s_.token_inner, t_.inner, ldinner, m.out.forward, panels_of(s_.length), t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) {
                    float* to = row(first + i) + panel * kPanel;
                    const float* bias = m.out.bias + panel * kPanel;
                    TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) {
                        const Vec mixed = v[j] + load(bias + j * W);
                        store(to + j * W, p_.net.pre_norm ? mixed : load(to + j * W) + mixed);
                    }
                });
        if (p_.net.pre_norm) return;
        for (int64_t r = first; r < last; ++r) {
            const float scale = norm_scale(row(r), s_.length, p_.net.eps);
            for (int64_t c = 0; c < padded; c += W) store(row(r) + c, load(row(r) + c) * scale);
            if (!kept) continue;
            kept[block].token_scale[r] = scale;
            keep_row(row(r), s_.length, kept[block].token_result, r);
        }
    }

    // Transposes a token mixer's output back to these rows: adds it to the stream or, if post-norm, replaces the
    // stream.
    void channels_to_rows(int64_t first, int64_t last) {
        const ptrdiff_t ldtokens = row_stride(s_.length);
        for (int64_t r = first; r < last; ++r) {
            const float* from = shared_.tokens + s_.column(r);
            float* to = h(r);
            for (int64_t c = 0; c < s_.width; ++c)
                to[c] = p_.net.pre_norm ? to[c] + from[c * ldtokens] : from[c * ldtokens];
        }
    }

    // h += input @ m + bias.
    void add_product(const PackedMatrix& m, int64_t depth, const float* input, ptrdiff_t ldinput, int64_t first,
                     int64_t last) {
        product(last - first, depth, input, ldinput, m.forward, panels_of(s_.width), t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) {
                    float* to = h(first + i) + panel * kPanel;
                    const float* bias = m.bias + panel * kPanel;
                    TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j)
                        store(to + j * W, load(to + j * W) + (v[j] + load(bias + j * W)));
                },
                [&](int64_t i, int height, int64_t panel) {
                    prefetch(h(first + i) + panel * kPanel, row_stride(s_.width), height);
                });
    }

    // Returns the input of a mixer or MLP for these rows: the stream, or if pre-norm, the normalised rows in the
    // scratch.
    const float* block_input(int64_t first, int64_t last, float* scales = nullptr, const Panels* kept = nullptr) {
        const float* input = h(first);
        if (p_.net.pre_norm) {
            normalise(first, last, scales);
            input = t_.rows;
        }
        for (int64_t r = first; kept && r < last; ++r)
            keep_row(input + (r - first) * row_stride(s_.width), s_.width, *kept, r);
        return input;
    }

    // Writes the normalised stream to the rows of the scratch.
    void normalise(int64_t first, int64_t last, float* scales) {
        const ptrdiff_t ld = row_stride(s_.width);
        for (int64_t r = first; r < last; ++r) {
            const float* from = h(r);
            float* to = t_.rows + (r - first) * ld;
            const float scale = norm_scale(from, s_.width, p_.net.eps);
            if (scales) scales[r] = scale;
            for (int64_t c = 0; c < s_.padded; c += W) store(to + c, load(from + c) * scale);
        }
    }

    void normalise_stream(float* scales, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            float* row = h(r);
            const float scale = norm_scale(row, s_.width, p_.net.eps);
            if (scales) scales[r] = scale;
            for (int64_t c = 0; c < s_.padded; c += W) store(row + c, load(row + c) * scale);
        }
    }

    void normalise_output(const KeptCall* kept) {
        const float* weight = p_.recursion.output_norm;
        for (int64_t r = first(); r < last(); ++r) {
            float* row = h(r);
            const float scale = norm_scale(row, s_.width, p_.recursion.output_eps);
            for (int64_t c = 0; c < s_.padded; c += W) store(row + c, load(row + c) * scale);
            if (kept) {
                kept->output_scale[r] = scale;
                keep_row(row, s_.width, kept->normalised, r);
            }
            if (weight)
                for (int64_t c = 0; c < s_.width; ++c) row[c] *= weight[c];
        }
    }

    void rotate(float* qkv, int64_t first, int64_t last) const {
        for_row_ranges(p_.samples, first, last, [&](RowRange part) {
            for (int64_t r = part.first; r < part.last; ++r)
                rotate_heads(p_, qkv, r, r - p_.samples.starts[part.sample], 0, s_.heads, 1.0f);
        });
    }

    AttentionInput attention_input(const float* qkv, int64_t buffer, int64_t call) const {
        return {qkv,         shared_.keys[buffer],     shared_.values[buffer], p_.samples.keys, p_.batch.rows,
                shared_.first_key, p_.recursion.dropout, p_.recursion.seed,    call};
    }

    const Problem& p_;
    const Sizes& s_;
    const PackedBlock* blocks_;
    Shared shared_;
    Scratch t_;
    Team team_;
    RowSchedule row_schedule_, channel_schedule_;
    // Index of the buffer of keys and values that is written next. Two are enough: before a thread writes one, it has
    // passed a barrier that all readers reach after reading that buffer.
    int64_t buffer_ = 0;
};

}  // namespace trm::TRM_ISA
