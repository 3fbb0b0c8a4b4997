// Backward of one call of a network, by one thread of a team.
//
// Each block has three parts, separated by barriers: (1) row by row, from the gradient of the block's output to the
// gradient of the attention output; (2) the attention of each head and weight gradients, as a list of items that
// threads process dynamically; (3) row by row, to the gradient of the block's input, and the weight gradients of
// queries, keys and values. A token mixer processes its channels between (1) and (2). One thread computes an item from
// start to end, so results do not depend on the number of threads, except for the weights of the output norm and of a
// token mixer's norm.
#pragma once

#include "forward.h"

namespace trm::TRM_ISA {

class Backward {
public:
    Backward(const Problem& problem, const PackedBlock* blocks, const BlockGradient* gradients,
             const SharedGradient& shared, const Scratch& scratch, const AttentionScratch& attention,
             float* gradient_scratch, Team team)
        : p_(problem), s_(problem.sizes), blocks_(blocks), gradients_(gradients), g_(shared), t_(scratch),
          attention_(attention), gradient_scratch_(gradient_scratch), team_(team),
          row_schedule_(team, problem.batch.rows, kChunkRows),
          channel_schedule_(team, problem.sizes.channels(problem.batch.rows), kChunkRows) {}

    // Replaces the gradient of the call's output in the shared `h` by the gradient of its input. Calls run in reverse
    // order, so the last call initialises the weight gradients.
    void call(int64_t index, const KeptBlock* kept, const KeptCall& kept_call) {
        if (p_.recursion.output_eps >= 0.0f) output_norm(kept_call);
        for (int64_t b = p_.net.blocks - 1; b >= 0; --b) block(index, b, kept[b]);
        if (row_schedule_.dynamic) team_.wait();
    }

    float* h(int64_t row) const { return g_.h + row * ld_; }

private:
    void block(int64_t index, int64_t b, const KeptBlock& kept) {
        const int64_t call = index * p_.net.blocks + b;
        const bool add = index < p_.recursion.steps;
        int64_t* counters = g_.counters + 5 * call;
        if (row_schedule_.dynamic) team_.wait();
        row_schedule_.chunks(counters,
                             [&](int64_t first, int64_t last) { mlp_and_output_backward(b, kept, first, last); });
        team_.wait();
        if (s_.tokens()) {
            channel_schedule_.chunks(
                counters + 1, [&](int64_t first, int64_t last) { token_mixer_backward(b, kept, first, last); });
            team_.wait();
            token_weights(b, kept, add, counters + 2);
            team_.wait();
            if (p_.net.pre_norm) token_norm(b, kept);
            row_schedule_.chunks(counters + 3,
                                 [&](int64_t first, int64_t last) { channels_to_rows(b, kept, first, last); });
            return;
        }
        attention_and_weights(b, kept, call, add, counters + 1);
        team_.wait();
        row_schedule_.chunks(counters + 2,
                             [&](int64_t first, int64_t last) { projection_backward(b, kept, first, last); });
        const WeightGradient all[] = {
            {p_.batch.rows, 3 * s_.width, s_.width, g_.qkv, row_stride(3 * s_.width), kept.first, gradients_[b].qkv}};
        compute_groups(counters + 3, 0, next_item(counters + 3), all, add);
    }

    // Backward of the MLP, then of the operation before it.
    void mlp_and_output_backward(int64_t b, const KeptBlock& kept, int64_t first, int64_t last) {
        if (!p_.net.pre_norm)
            for (int64_t r = first; r < last; ++r)
                norm_backward(h(r), kept.result, r, kept.scale2[r], s_.width, nullptr, h(r));
        const PackedBlock& m = blocks_[b];
        mlp_backward({m.up, m.down, s_.width, s_.inner, s_.up, p_.net.gated, kept.up, g_.inner, g_.up}, h(first), ld_,
                    first, last);
        for (int64_t r = first; r < last; ++r) {
            float *from = t_.rows + (r - first) * ld_, *to = g_.middle + r * ld_;
            if (p_.net.pre_norm) {
                norm_backward(from, kept.second, r, kept.scale2[r], s_.width, h(r), to);
                continue;
            }
            for (int64_t c = 0; c < s_.padded; c += W) store(to + c, load(from + c) + load(h(r) + c));
            if (!s_.tokens()) norm_backward(to, kept.second, r, kept.scale1[r], s_.width, nullptr, to);
        }
        s_.tokens() ? rows_to_channels(first, last) : attention_output_backward(b, kept, first, last);
    }

    // Arguments of an MLP's backward: its matrices, and the data that the forward kept.
    struct Mlp {
        const PackedMatrix &up_matrix, &down_matrix;
        int64_t width, inner, columns;
        bool gated;
        Panels kept;         // input of the activation
        Panels activated;    // its output, recomputed
        float* up_gradient;  // row by row
    };

    // Computes the gradient of an MLP's input, in the rows of the scratch, from that of its output, rows of `ld`
    // floats.
    void mlp_backward(const Mlp& m, const float* grad, ptrdiff_t ld, int64_t first, int64_t last) {
        const ptrdiff_t ldup = row_stride(m.columns), ldrows = row_stride(m.width);
        product(last - first, m.width, grad, ld, m.down_matrix.backward, panels_of(m.inner), t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) { activation(m, first + i, panel, v); },
                [&](int64_t i, int height, int64_t panel) {
                    const int64_t read = m.gated ? kPanelVectors : 1;  // panels of the activation's input
                    for (int64_t q = panel * read; q < min((panel + 1) * read, panels_of(m.columns)); ++q)
                        prefetch(m.kept.at(first + i, q * kPanel), kPanel, height);
                });
        product(last - first, m.columns, m.up_gradient + first * ldup, ldup, m.up_matrix.backward, panels_of(m.width),
                t_.partial,
                [&](int64_t i, int64_t panel, const Vec* v) { store_panel(t_.rows + i * ldrows, panel, v); });
    }

    void attention_output_backward(int64_t b, const KeptBlock& kept, int64_t first, int64_t last) {
        float* attended = g_.attended + first * ld_;
        product(last - first, s_.width, g_.middle + first * ld_, ld_, blocks_[b].out.backward, panels_of(s_.width),
                t_.partial, [&](int64_t i, int64_t panel, const Vec* v) { store_panel(attended + i * ld_, panel, v); });
        for (int64_t r = first; r < last; ++r) {
            const float* grad = g_.attended + r * ld_;
            for (int64_t head = 0; head < s_.heads; ++head) {
                int64_t c = head * s_.head;
                const int64_t end = c + s_.head;
                Vec sums = {};
                // Whole vectors if none of them crosses a panel boundary.
                for (; s_.head % W == 0 && c < end; c += W) sums += load(grad + c) * load(kept.mixed.at(r, c));
                float total = sum(sums);
                for (; c < end; ++c) total += grad[c] * *kept.mixed.at(r, c);
                g_.delta[head * p_.batch.rows + r] = total;
            }
        }
    }

    // Computes the gradient of the activation's input from that of its output in panel `panel`, and recomputes the
    // output.
    TRM_INLINE void activation(const Mlp& m, int64_t row, int64_t panel, const Vec* v) {
        float* activated = m.activated.at(row, panel * kPanel);
        float* to = m.up_gradient + row * row_stride(m.columns);
        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) {
            if (m.gated) {
                const int64_t pair = panel * kPanelVectors + j;  // the panel of `up` that produced these W columns
                if (pair * kPanel >= m.columns) {
                    store(activated + j * W, Vec{});
                    continue;
                }
                const float* from = m.kept.at(row, pair * kPanel);
                const Vec gate = load(from), value = load(from + W), s = sigmoid(gate), silu = gate * s;
                store(activated + j * W, silu * value);
                store(to + pair * kPanel, v[j] * value * (s + silu * (1.0f - s)));
                store(to + pair * kPanel + W, v[j] * silu);
            } else {
                const Vec u = load(m.kept.at(row, panel * kPanel) + j * W);
                const Normal n = normal(u);
                store(activated + j * W, u * n.cdf);
                store(to + panel * kPanel + j * W, v[j] * (n.cdf + u * n.density));
            }
        }
    }

    void attention_and_weights(int64_t b, const KeptBlock& kept, int64_t call, bool add, int64_t* counter) {
        const AttentionGradient input{kept.qkv, kept.maxima, kept.inverses, g_.attended, g_.delta, g_.qkv,
                                      p_.batch.rows, p_.recursion.dropout, p_.recursion.seed, call};
        const int64_t rows = p_.batch.rows, heads = p_.samples.count * s_.heads;
        int64_t item = next_item(counter);
        for (; item < heads; item = next_item(counter)) {
            const int64_t sample = item / s_.heads, head = item % s_.heads;
            const int64_t start = p_.samples.starts[sample], length = p_.samples.length(sample);
            attend_backward(s_, start, length, head, input, attention_);
            if (p_.net.rotary)
                for (int64_t i = 0; i < length; ++i)
                    rotate_heads(p_, g_.qkv, start + i, i, head, head + 1, -1.0f);
        }
        const WeightGradient all[] = {
            {rows, s_.up, s_.width, g_.up, row_stride(s_.up), kept.second, gradients_[b].up},
            {rows, s_.width, s_.inner, g_.h, ld_, g_.inner, gradients_[b].down},
            {rows, s_.width, s_.width, g_.middle, ld_, kept.mixed, gradients_[b].out}};
        compute_groups(counter, heads, item - heads, all, add);
    }

    struct WeightGradient {
        int64_t rows, outputs, inputs;
        const float* dy;
        ptrdiff_t ldy;
        Panels x;
        PackedGradient to;
    };

    // Computes groups of a list of weight gradients, starting with group `item`, which this thread has already taken.
    // The counter's first `before` items do not belong to the list.
    template <int N>
    void compute_groups(int64_t* counter, int64_t before, int64_t item, const WeightGradient (&all)[N], bool add) {
        for (;; item = next_item(counter) - before) {
            const WeightGradient* w = all;
            int64_t group = item;
            for (; w < all + N && group >= groups_of(w->outputs); ++w) group -= groups_of(w->outputs);
            if (w == all + N) return;
            weight_gradient(group, w->rows, w->outputs, w->inputs, w->dy, w->ldy, w->x, w->to.weight, w->to.ld,
                            w->to.bias, add, gradient_scratch_);
        }
    }

    void projection_backward(int64_t b, const KeptBlock& kept, int64_t first, int64_t last) {
        const ptrdiff_t ldqkv = row_stride(3 * s_.width);
        product(last - first, 3 * s_.width, g_.qkv + first * ldqkv, ldqkv, blocks_[b].qkv.backward, panels_of(s_.width),
                t_.partial, [&](int64_t i, int64_t panel, const Vec* v) { store_panel(t_.rows + i * ld_, panel, v); });
        for (int64_t r = first; r < last; ++r) {
            const float *from = t_.rows + (r - first) * ld_, *middle = g_.middle + r * ld_;
            if (p_.net.pre_norm) {
                norm_backward(from, kept.first, r, kept.scale1[r], s_.width, middle, h(r));
            } else {
                for (int64_t c = 0; c < s_.padded; c += W) store(h(r) + c, load(from + c) + load(middle + c));
            }
        }
    }

    // Writes the gradient of a token mixer's output in these rows as columns.
    void rows_to_channels(int64_t first, int64_t last) {
        const ptrdiff_t ldtokens = row_stride(s_.length);
        for (int64_t r = first; r < last; ++r) {
            const float* row = g_.middle + r * ld_;
            float* to = g_.tokens + s_.column(r);
            for (int64_t c = 0; c < s_.width; ++c) to[c * ldtokens] = row[c];
        }
    }

    // Computes the gradient of a token mixer's input from that of its output, for channels [first, last).
    void token_mixer_backward(int64_t b, const KeptBlock& kept, int64_t first, int64_t last) {
        const ptrdiff_t ld = row_stride(s_.length);
        const int64_t padded = round_up(s_.length, kPanel);
        for (int64_t r = first; r < last; ++r) {
            float* row = g_.tokens + r * ld;
            for (int64_t c = s_.length; c < padded; ++c) row[c] = 0.0f;
            if (p_.net.pre_norm) continue;
            norm_backward(row, kept.token_result, r, kept.token_scale[r], s_.length, nullptr, row);
        }
        const PackedBlock& m = blocks_[b];
        mlp_backward({m.qkv, m.out, s_.length, s_.token_inner, s_.token_up, s_.token_gated, kept.token_up,
                     g_.token_inner, g_.token_up},
                    g_.tokens + first * ld, ld, first, last);
        for (int64_t r = first; r < last; ++r) {
            const float *from = t_.rows + (r - first) * ld, *residual = g_.tokens + r * ld;
            float* to = g_.token_input + r * ld;
            for (int64_t c = 0; c < padded; c += W)
                store(to + c, p_.net.pre_norm ? load(from + c) : load(from + c) + load(residual + c));
        }
    }

    void token_weights(int64_t b, const KeptBlock& kept, bool add, int64_t* counter) {
        const BlockGradient& to = gradients_[b];
        const ptrdiff_t ld = row_stride(s_.length);
        const int64_t rows = p_.batch.rows, channels = s_.channels(rows);
        const WeightGradient all[] = {
            {rows, s_.up, s_.width, g_.up, row_stride(s_.up), kept.second, to.up},
            {rows, s_.width, s_.inner, g_.h, ld_, g_.inner, to.down},
            {channels, s_.token_up, s_.length, g_.token_up, row_stride(s_.token_up), kept.tokens, to.qkv},
            {channels, s_.length, s_.token_inner, g_.tokens, ld, g_.token_inner, to.out}};
        compute_groups(counter, 0, next_item(counter), all, add);
    }

    // Computes the gradient of the weight of a pre-norm token mixer's norm. Each thread sums over a fixed range of
    // rows, independent of the dynamic distribution of chunks.
    void token_norm(int64_t b, const KeptBlock& kept) {
        const ptrdiff_t ldtokens = row_stride(s_.length);
        double* norm = g_.norm1 + (team_.thread * p_.net.blocks + b) * s_.padded;
        for (int64_t r = team_.first(p_.batch.rows); r < team_.last(p_.batch.rows); ++r) {
            const float* from = g_.token_input + s_.column(r);
            for (int64_t c = 0; c < s_.width; ++c)
                norm[c] += static_cast<double>(from[c * ldtokens]) * *kept.first.at(r, c);
        }
    }

    // Computes the gradient of the block's input from that of a token mixer's input, whose rows are channels.
    void channels_to_rows(int64_t b, const KeptBlock& kept, int64_t first, int64_t last) {
        const ptrdiff_t ldtokens = row_stride(s_.length);
        for (int64_t r = first; r < last; ++r) {
            const float* from = g_.token_input + s_.column(r);
            float* to = p_.net.pre_norm ? t_.rows : h(r);
            for (int64_t c = 0; c < s_.width; ++c) to[c] = from[c * ldtokens];
            if (!p_.net.pre_norm) continue;
            for (int64_t c = 0; c < s_.width; ++c) to[c] *= blocks_[b].norm1[c];
            for (int64_t c = s_.width; c < s_.padded; ++c) to[c] = 0.0f;
            norm_backward(to, kept.first, r, kept.scale1[r], s_.width, g_.middle + r * ld_, h(r));
        }
    }

    void output_norm(const KeptCall& kept) {
        const float* weight = p_.recursion.output_norm;
        double* gradient = g_.output_norm + team_.thread * s_.padded;
        for (int64_t r = team_.first(p_.batch.rows); r < team_.last(p_.batch.rows); ++r) {
            float* row = h(r);
            if (weight)
                for (int64_t c = 0; c < s_.width; ++c) {
                    gradient[c] += static_cast<double>(row[c]) * *kept.normalised.at(r, c);
                    row[c] *= weight[c];
                }
            norm_backward(row, kept.normalised, r, kept.output_scale[r], s_.width, nullptr, row);
        }
    }

    static TRM_INLINE void store_panel(float* row, int64_t panel, const Vec* v) {
        TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j) store(row + panel * kPanel + j * W, v[j]);
    }

    const Problem& p_;
    const Sizes& s_;
    const PackedBlock* blocks_;
    const BlockGradient* gradients_;
    SharedGradient g_;
    Scratch t_;
    AttentionScratch attention_;
    float* gradient_scratch_;
    Team team_;
    RowSchedule row_schedule_, channel_schedule_;
    ptrdiff_t ld_ = row_stride(s_.width);
};

}  // namespace trm::TRM_ISA
