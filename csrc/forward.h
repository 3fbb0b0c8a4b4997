// A network applied to packed rows, by one thread of a team: products, norms and activations of its share of the rows,
// one barrier a block, before attention reads the keys and values of all (or two, around an MLP over positions).
#pragma once

#include "attention.h"
#include "pack.h"

namespace trm::TRM_ISA {

// What every call of a network reads, the same for all threads.
struct Problem {
    Problem(const Network& n, const Batch& b, const Recursion& r)
        : net(n), batch(b), recursion(r), sizes(n), samples(b) {}

    const Network& net;
    const Batch& batch;
    const Recursion& recursion;
    Sizes sizes;
    Samples samples;
};

// Rotates heads [first, last) of queries and keys, in row `row` of qkv, by the row's position; `place`: its place in
// its sample. `sign` -1 rotates back.
inline void rotate_heads(const Problem& p, float* qkv, int64_t row, int64_t place, int64_t first, int64_t last,
                         float sign) {
    const Sizes& s = p.sizes;
    const int64_t table = (p.batch.positions ? p.batch.positions[row] : place) * (s.head / 2);
    for (int part = 0; part < 2; ++part) {
        float* heads = qkv + row * row_stride(3 * s.width) + part * s.width + first * s.head;
        rotate_row(heads, last - first, s.head, p.batch.cos + table, p.batch.sin + table, sign);
    }
}

class Forward {
public:
    Forward(const Problem& problem, const PackedBlock* blocks, const Shared& shared, const Scratch& scratch, Team team)
        : p_(problem), s_(problem.sizes), blocks_(blocks), shared_(shared), t_(scratch), team_(team),
          shares_(team, problem.batch.rows, kChunkRows),
          channels_(team, problem.sizes.channels(problem.batch.rows), kChunkRows) {}

    // net(h) in place, for the rows of all threads; `kept`: [blocks] and the call's own, or null. Afterwards, as
    // before, a thread may read and write the rows that are its own.
    void call(int64_t index, const KeptBlock* kept, const KeptCall* kept_call) {
        if (shares_.varies) team_.wait();
        int64_t* counter = shared_.counters + index * (2 * p_.net.blocks + 1);
        shares_.chunks(counter++, [&](int64_t first, int64_t last) { hand_over(0, kept, first, last); });
        for (int64_t b = 0; b < p_.net.blocks; ++b) {
            team_.wait();
            const int64_t turn = turn_;
            turn_ ^= 1;
            if (s_.tokens()) {
                channels_.chunks(counter, [&](int64_t first, int64_t last) { mix_tokens(b, kept, first, last); });
                team_.wait();
            }
            shares_.chunks(counter + 1, [&](int64_t first, int64_t last) {
                if (s_.tokens()) {
                    take_tokens(first, last);
                } else {
                    mix(b, index * p_.net.blocks + b, turn, kept, first, last);
                }
                transform(b, kept, first, last);
                if (b + 1 < p_.net.blocks) hand_over(b + 1, kept, first, last);
            });
            counter += 2;
        }
        if (shares_.varies) team_.wait();
        if (p_.recursion.output_eps >= 0.0f) normalise_output(kept_call);
    }

    // The rows that are this thread's own between calls.
    int64_t first() const { return team_.first(p_.batch.rows); }
    int64_t last() const { return team_.last(p_.batch.rows); }
    float* h(int64_t row) const { return shared_.h + row * row_stride(s_.width); }

private:
    // What a block's mixer reads of these rows, for all to read after the next barrier.
    void hand_over(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        s_.tokens() ? give_tokens(block, kept, first, last) : project(block, kept, first, last);
    }

    // Queries, keys and values of a block, keys and values for all to read after the next barrier.
    void project(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width), ldqkv = row_stride(3 * s_.width);
        const PackedMatrix& m = blocks_[block].qkv;
        const float* input = kept ? enter(first, last, kept[block].scale1, &kept[block].first) : enter(first, last);
        float* qkv = kept ? kept[block].qkv : shared_.qkv;
        product(last - first, s_.width, input, ld, m.forward, panels_of(3 * s_.width), t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) {
                    float* to = qkv + (first + i) * ldqkv + panel * kPanel;
                    const float* bias = m.bias + panel * kPanel;
                    TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(to + j * W, v[j] + load(bias + j * W));
                });
        if (p_.net.rotary) rotate(qkv, first, last);
        share_keys(s_, p_.samples, attention_input(qkv, turn_, 0), first, last);
    }

    // The attention of a block, added to the stream.
    void mix(int64_t block, int64_t call, int64_t turn, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width);
        const float* qkv = kept ? kept[block].qkv : shared_.qkv;
        attend(s_, p_.samples, attention_input(qkv, turn, call), first, last, t_, t_.rows, ld,
               kept ? kept[block].top : nullptr, kept ? kept[block].inverse : nullptr);
        for (int64_t r = first; r < last; ++r) {
            float* row = t_.rows + (r - first) * ld;
            for (int64_t c = s_.width; c < s_.padded; ++c) row[c] = 0.0f;
            if (kept) keep_row(row, s_.width, kept[block].mixed, r);
        }
        add_product(blocks_[block].out, s_.width, t_.rows, ld, first, last);
        if (!p_.net.pre_norm) normalise_stream(kept ? kept[block].scale1 : nullptr, first, last);
    }

    // The MLP of a block, added to the stream.
    void transform(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.width), ldinner = row_stride(round_up(s_.inner, W));
        const PackedMatrix& m = blocks_[block].up;
        const float* input = kept ? enter(first, last, kept[block].scale2, &kept[block].second) : enter(first, last);
        expand({m, s_.width, s_.up, ldinner, p_.net.gated}, input, ld, first, last, kept ? &kept[block].up : nullptr);
        add_product(blocks_[block].down, s_.inner, t_.inner, ldinner, first, last);
        if (p_.net.pre_norm) return;
        normalise_stream(kept ? kept[block].scale2 : nullptr, first, last);
        if (kept)
            for (int64_t r = first; r < last; ++r) keep_row(h(r), s_.width, kept[block].result, r);
    }

    struct Expansion {
        const PackedMatrix& matrix;
        int64_t depth, columns;
        ptrdiff_t ldinner;
        bool gated;
    };

    // The inner rows of an MLP, to the scratch: the activation of input @ matrix + bias.
    void expand(const Expansion& m, const float* input, ptrdiff_t ld, int64_t first, int64_t last, const Panels* kept) {
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

    // A token mixer's input: these rows, normalised where the network is pre-norm, as columns.
    void give_tokens(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
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

    // The MLP over positions of channels [first, last); post-norm with its residual and norm.
    void mix_tokens(int64_t block, const KeptBlock* kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.length), ldinner = row_stride(round_up(s_.token_inner, W));
        const int64_t padded = round_up(s_.length, kPanel);
        const PackedBlock& m = blocks_[block];
        const auto row = [&](int64_t r) { return shared_.tokens + r * ld; };
        for (int64_t r = first; r < last; ++r) {
            for (int64_t c = s_.length; c < padded; ++c) row(r)[c] = 0.0f;
            if (kept) keep_row(row(r), s_.length, kept[block].tokens, r);
        }
        expand({m.qkv, s_.length, s_.token_up, ldinner, s_.token_gated}, row(first), ld, first, last,
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

    // A token mixer's output, back to these rows: added to the stream, or (post-norm) in its place.
    void take_tokens(int64_t first, int64_t last) {
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
                    fetch(h(first + i) + panel * kPanel, row_stride(s_.width), height);
                });
    }

    // What a mixer or an MLP reads of these rows: the stream, normalised to the scratch where the network is pre-norm.
    const float* enter(int64_t first, int64_t last, float* scales = nullptr, const Panels* kept = nullptr) {
        const float* input = h(first);
        if (p_.net.pre_norm) {
            normalise(first, last, scales);
            input = t_.rows;
        }
        for (int64_t r = first; kept && r < last; ++r)
            keep_row(input + (r - first) * row_stride(s_.width), s_.width, *kept, r);
        return input;
    }

    // The normalised stream, to the rows of the scratch.
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
        for_stretches(p_.samples, first, last, [&](Stretch part) {
            for (int64_t r = part.first; r < part.last; ++r)
                rotate_heads(p_, qkv, r, r - p_.samples.starts[part.sample], 0, s_.heads, 1.0f);
        });
    }

    AttentionInput attention_input(const float* qkv, int64_t turn, int64_t call) const {
        return {qkv,         shared_.keys[turn],     shared_.values[turn], p_.samples.keys, p_.batch.rows,
                shared_.first_key, p_.recursion.dropout, p_.recursion.seed,    call};
    }

    const Problem& p_;
    const Sizes& s_;
    const PackedBlock* blocks_;
    Shared shared_;
    Scratch t_;
    Team team_;
    Shares shares_, channels_;
    // Which of the two buffers of keys and values is written next. Two suffice: whoever writes one has passed the
    // barrier that all its readers reached after they had read it.
    int64_t turn_ = 0;
};

}  // namespace trm::TRM_ISA
