// Softmax attention within each sample, on the heads of packed rows.
#pragma once

#include "dropout.h"
#include "layout.h"

namespace trm::TRM_ISA {

// A matrix [rows, columns], with columns padded to a multiple of W, in panels. The last panel may be one vector wide.
struct NarrowPanels {
    float* base;
    int64_t rows, columns;

    TRM_INLINE float* at(int64_t row, int64_t column) const {
        return base + column * rows + row * min(kPanel, columns - column);  // column: first column of a panel
    }
    // Stores `size` floats as row `row`, padded with zeros.
    TRM_INLINE void store_row(int64_t row, const float* from, int64_t size) const {
        for (int64_t c = 0; c < columns; c += kPanel) {
            float* to = at(row, c);
            for (int64_t e = c; e < min(columns, c + kPanel); e += W)
                store(to + e - c, e + W <= size ? load(from + e) : load_first(from + e, static_cast<int>(size - e)));
        }
    }
};

// C [height, columns] (+)= A B, for `depth` rows of B starting at `row`.
template <Left A>
TRM_INLINE void narrow_product(int height, int64_t depth, const float* a, ptrdiff_t lda, NarrowPanels b, int64_t row,
                               float* c, ptrdiff_t ldc, bool accumulate, Prefetch ahead) {
    int64_t n = 0;
    for (; n + kPanel <= b.columns; n += kPanel)
        tiles<kPanelVectors, A>.by_height[height](depth, a, lda, {b.at(row, n), 0}, c + n, ldc, accumulate, ahead);
    if (n < b.columns)
        tiles<1, A>.by_height[height](depth, a, lda, {b.at(row, n), 0}, c + n, ldc, accumulate, ahead);
}

// Address of key `key` of one head in the layout that products read: transposed, in panels of keys.
TRM_INLINE float* key_at(float* keys, int64_t key, int64_t size) {
    return keys + key / kPanel * size * kPanel + key % kPanel;
}

// Transposes up to W of `count` rows of `size` floats, `ld` floats apart, into columns of a panel at `to`, padded with
// zeros.
TRM_INLINE void transpose_rows(const float* from, ptrdiff_t ld, int64_t count, int64_t size, float* to) {
    for (int64_t e = 0; e < size; e += W) {
        const int left = static_cast<int>(min(W, size - e));
        Vec square[W];
        for (int64_t i = 0; i < W; ++i)
            square[i] = i >= count ? Vec{} : left == W ? load(from + i * ld + e) : load_first(from + i * ld + e, left);
        transpose(square);
        for (int i = 0; i < left; ++i) store(to + (e + i) * kPanel, square[i]);
    }
}

// Rows [first, last) of one sample, inside the caller's chunk.
struct RowRange {
    int64_t sample, first, last;
};

// Calls f for the part of each sample inside rows [first, last).
template <class F>
TRM_INLINE void for_row_ranges(const Samples& samples, int64_t first, int64_t last, F&& f) {
    for (int64_t s = samples.of(first); first < last; ++s) {
        const int64_t end = min(samples.starts[s + 1], last);
        if (end > first) f(RowRange{s, first, end});
        first = max(first, end);
    }
}

// Replaces scores [length] by e^(scale (score - maximum)), the unnormalised softmax, and the rest of the last vector by
// values close to 0. Returns the sum. `maximum`, the largest score, is subtracted before scaling, so that the rounding
// error does not grow with the scores.
TRM_INLINE float softmax_numerators(float* scores, int64_t length, float scale, float& maximum) {
    const int64_t padded = round_up(length, W);
    for (int64_t j = length; j < padded; ++j) scores[j] = -__builtin_inff();
    Vec maxima = load(scores);
    for (int64_t j = W; j < padded; j += W) maxima = max(maxima, load(scores + j));
    maximum = max(maxima);
    Vec sums = {};
    for (int64_t j = 0; j < padded; j += W) {
        const Vec weight = exp((load(scores + j) - maximum) * scale);
        store(scores + j, weight);
        sums += weight;
    }
    return sum(sums);
}

struct AttentionInput {
    const float* qkv;  // rows of projections, from which queries are read
    float* keys;       // keys of all heads, in panels
    float* values;     // values of all heads, in narrow panels
    int64_t all_keys, rows;
    const int64_t* first_key;
    float dropout;
    uint64_t seed;
    int64_t call;

    NarrowPanels values_of(const Sizes& s, int64_t head, int64_t start, int64_t length) const {
        return {values + (head * rows + start) * s.padded_head, length, s.padded_head};
    }
};

// Writes the attention output of rows [first, last) to `to` [last - first, width] and, unless null, maximum scores and
// inverse sums of weights to maxima and inverses [H, R].
inline void attend(const Sizes& s, const Samples& samples, const AttentionInput& in, int64_t first, int64_t last,
                   Scratch& scratch, float* to, ptrdiff_t ldto, float* maxima, float* inverses) {
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(s.head));
    const ptrdiff_t ldqkv = row_stride(3 * s.width);
    for_row_ranges(samples, first, last, [&](RowRange part) {
        const int64_t length = samples.length(part.sample);
        const int64_t start = samples.starts[part.sample];
        const int64_t panels = panels_of(length);
        const ptrdiff_t ldscores = row_stride(length);
        for (int64_t head = 0; head < s.heads; ++head) {
            const float* keys = in.keys + (head * in.all_keys + in.first_key[part.sample]) * s.head;
            const NarrowPanels values = in.values_of(s, head, start, length);
            // Keys and values of the next head are prefetched in the meantime.
            const int64_t count = tiles_of(part.last - part.first), ahead = head + 1 < s.heads;
            Prefetch next_keys{keys + ahead * in.all_keys * s.head, (kPanel + count - 1) / count};
            Prefetch next_values{values.base + ahead * in.rows * s.padded_head, (s.padded_head + count - 1) / count};
            for_tiles(part.last - part.first, [&](int64_t offset, int height) {
                const int64_t row = part.first + offset;
                const float* q = in.qkv + row * ldqkv + head * s.head;
                for (int64_t p = 0; p < panels; ++p) {
                    const float* panel = keys + p * s.head * kPanel;
                    tiles<kPanelVectors, Left::kByRows>.by_height[height](s.head, q, ldqkv, {panel, 0},
                                                                scratch.scores + p * kPanel, ldscores, false,
                                                                next_keys);
                    next_keys.from += s.head * next_keys.step;
                }
                float inverse[kTileRows];
                for (int i = 0; i < height; ++i) {
                    float* weights = scratch.scores + i * ldscores;
                    float maximum;
                    inverse[i] = 1.0f / softmax_numerators(weights, length, scale, maximum);
                    if (maxima) {
                        maxima[head * in.rows + row + i] = maximum;
                        inverses[head * in.rows + row + i] = inverse[i];
                    }
                    if (in.dropout > 0.0f) {
                        const Dropout dropout(in.dropout, in.seed, in.call, head, row + i);
                        for (int64_t j = 0; j < length; j += W)
                            store(weights + j, load(weights + j) * dropout.factor(j));
                    }
                }
                narrow_product<Left::kByRows>(height, length, scratch.scores, ldscores, values, 0, scratch.attended,
                                      s.padded_head, false, next_values);
                next_values.from += length * next_values.step;
                for (int i = 0; i < height; ++i) {
                    const float* from = scratch.attended + i * s.padded_head;
                    float* out = to + (row + i - first) * ldto + head * s.head;
                    int64_t e = 0;
                    for (; e + W <= s.head; e += W) store(out + e, load(from + e) * inverse[i]);
                    for (; e < s.head; ++e) out[e] = from[e] * inverse[i];
                }
            });
        }
    });
}

// Packs keys and values of rows [first, last) of qkv for all threads.
inline void pack_keys_and_values(const Sizes& s, const Samples& samples, const AttentionInput& in, int64_t first,
                                 int64_t last) {
    const ptrdiff_t ldqkv = row_stride(3 * s.width);
    for_row_ranges(samples, first, last, [&](RowRange part) {
        const int64_t start = samples.starts[part.sample];
        const auto keys = [&](int64_t head) {
            return in.keys + (head * in.all_keys + in.first_key[part.sample]) * s.head;
        };
        for (int64_t row = part.first; row < part.last;) {
            // Whole vectors of a panel at a time, except where another thread has some of their keys.
            const int64_t key = row - start, count = key % W == 0 && row + W <= part.last ? W : 1;
            const float* k = in.qkv + row * ldqkv + s.width;
            for (int64_t head = 0; head < s.heads; ++head) {
                float* to = key_at(keys(head), key, s.head);
                if (count == W) {
                    transpose_rows(k + head * s.head, ldqkv, W, s.head, to);
                } else {
                    for (int64_t e = 0; e < s.head; ++e) to[e * kPanel] = k[head * s.head + e];
                }
                const float* v = k + s.width + head * s.head;
                const NarrowPanels values = in.values_of(s, head, start, samples.length(part.sample));
                for (int64_t i = 0; i < count; ++i) values.store_row(key + i, v + i * ldqkv, s.head);
            }
            row += count;
        }
    });
}

// The scratch of one thread in attention's backward, for samples of up to `longest` rows.
struct AttentionScratch {
    float* keys;      // transposed, in panels
    float* values;    // likewise
    float *query_rows, *key_rows, *grad_rows;  // in narrow panels [longest, padded head]
    float *key_grad, *value_grad;              // [longest, padded head]
    float* query_grad;                         // [kTileRows, padded head]
    float *weights, *score_grad;               // [kChunkRows, longest]
};

inline AttentionScratch lay_out_attention_scratch(Arena& arena, const Sizes& s, int64_t longest) {
    AttentionScratch t;
    t.keys = arena.allocate(round_up(longest, kPanel) * s.head);
    t.values = arena.allocate(round_up(longest, kPanel) * s.head);
    float** const rows[] = {&t.query_rows, &t.key_rows, &t.grad_rows, &t.key_grad, &t.value_grad};
    for (float** range : rows) *range = arena.allocate(longest * s.padded_head);
    t.query_grad = arena.allocate(kTileRows * s.padded_head);
    t.weights = arena.allocate(kChunkRows * row_stride(longest));
    t.score_grad = arena.allocate(kChunkRows * row_stride(longest));
    return t;
}

struct AttentionGradient {
    const float* qkv;    // kept by the forward, row by row
    const float *maxima, *inverses;  // kept by the forward [H, R]
    const float* grad;   // gradient of the attention output, rows of row_stride(width)
    const float* delta;  // sums of gradient * attention output [H, R]
    float* qkv_grad;     // rows like qkv
    int64_t rows;
    float dropout;
    uint64_t seed;
    int64_t call;
};

// Computes the gradients of queries, keys and values of one head of one sample.
inline void attend_backward(const Sizes& s, int64_t start, int64_t length, int64_t head, const AttentionGradient& in,
                            AttentionScratch& t) {
    if (length == 0) return;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(s.head));
    const ptrdiff_t ldqkv = row_stride(3 * s.width), ldgrad = row_stride(s.width);
    const ptrdiff_t ldscores = row_stride(length);
    const int64_t size = s.head, padded = s.padded_head, keys = round_up(length, W);
    const float* qkv = in.qkv + start * ldqkv + head * size;
    const float* grad = in.grad + start * ldgrad + head * size;
    const NarrowPanels query_rows{t.query_rows, length, padded}, key_rows{t.key_rows, length, padded},
        grad_rows{t.grad_rows, length, padded};
    for (int64_t r = 0; r < length; ++r) {
        const float *q = qkv + r * ldqkv, *k = q + s.width, *v = k + s.width, *d = grad + r * ldgrad;
        if (r % W == 0) {
            transpose_rows(k, ldqkv, length - r, size, key_at(t.keys, r, size));
            transpose_rows(v, ldqkv, length - r, size, key_at(t.values, r, size));
        }
        query_rows.store_row(r, q, size);
        key_rows.store_row(r, k, size);
        grad_rows.store_row(r, d, size);
    }
    for (int64_t first = 0; first < length; first += kChunkRows) {
        const int64_t rows = min(kChunkRows, length - first);
        for_tiles(rows, [&](int64_t offset, int height) {
            float *weights = t.weights + offset * ldscores, *scores = t.score_grad + offset * ldscores;
            const float *q = qkv + (first + offset) * ldqkv, *d = grad + (first + offset) * ldgrad;
            for (int64_t p = 0; p < panels_of(length); ++p) {
                const float *key = t.keys + p * size * kPanel, *value = t.values + p * size * kPanel;
                tiles<kPanelVectors, Left::kByRows>.by_height[height](size, q, ldqkv, {key, 0}, weights + p * kPanel,
                                                            ldscores, false, Prefetch{q, 0});
                tiles<kPanelVectors, Left::kByRows>.by_height[height](size, d, ldgrad, {value, 0}, scores + p * kPanel,
                                                            ldscores, false, Prefetch{q, 0});
            }
            for (int i = 0; i < height; ++i) {
                const int64_t row = start + first + offset + i;
                const int64_t at = head * in.rows + row;
                const float maximum = in.maxima[at], inverse = in.inverses[at], delta = in.delta[at];
                float *w = weights + i * ldscores, *g = scores + i * ldscores;
                for (int64_t j = length; j < keys; ++j) w[j] = -__builtin_inff(), g[j] = 0.0f;
                const Dropout dropout(in.dropout, in.seed, in.call, head, row);
                for (int64_t j = 0; j < keys; j += W) {
                    const Vec weight = exp((load(w + j) - maximum) * scale) * inverse;
                    if (in.dropout > 0.0f) {
                        const Vec factor = dropout.factor(j);
                        store(w + j, weight * factor);
                        store(g + j, weight * (load(g + j) * factor - delta) * scale);
                    } else {
                        store(w + j, weight);
                        store(g + j, weight * (load(g + j) - delta) * scale);
                    }
                }
            }
            narrow_product<Left::kByRows>(height, length, scores, ldscores, key_rows, 0, t.query_grad, padded, false,
                                  Prefetch{scores, 0});
            for (int i = 0; i < height; ++i) {
                float* to = in.qkv_grad + (start + first + offset + i) * ldqkv + head * size;
                write_row(t.query_grad + i * padded, size, to);
            }
        });
        for_tiles(length, [&](int64_t key, int height) {
            narrow_product<Left::kByColumns>(height, rows, t.weights + key, ldscores, grad_rows, first,
                                 t.value_grad + key * padded, padded, first > 0, Prefetch{t.weights, 0});
            narrow_product<Left::kByColumns>(height, rows, t.score_grad + key, ldscores, query_rows, first,
                                 t.key_grad + key * padded, padded, first > 0, Prefetch{t.weights, 0});
        });
    }
    for (int64_t r = 0; r < length; ++r) {
        float* k = in.qkv_grad + (start + r) * ldqkv + s.width + head * size;
        float* v = k + s.width;
        write_row(t.key_grad + r * padded, size, k);
        write_row(t.value_grad + r * padded, size, v);
    }
}

}  // namespace trm::TRM_ISA
