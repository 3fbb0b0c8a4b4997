// Products of activations with packed matrices, and weight gradients.
#pragma once

#include "micro_kernel.h"

namespace trm::TRM_ISA {

// Number of rows that a thread processes through a block at once: large enough that at usual sizes each thread reads a
// panel of weights only once or twice, small enough that the activations stay in the L2 cache.
constexpr int64_t kChunkRows = 12 * 14 / kTileRows * kTileRows;
// Depth and columns of a part of a product: a panel of that depth fits (almost) into the L1 cache, and the partial sums
// of a chunk into the L2 cache.
constexpr int64_t kDepth = 512;
constexpr int64_t kPartPanels = 1024 / kPanel;
// The row stride is not a multiple of 4 KiB, which would map the rows of a tile to the same L1 cache set.
constexpr int64_t kPartialRow = kPartPanels * kPanel + 16;
constexpr int64_t kPartialSize = kChunkRows * kPartialRow;

constexpr int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// A matrix [rows, columns] in panels: [columns / kPanel, rows, kPanel], the last one padded with zeros.
struct Panels {
    float* base;
    int64_t rows;

    TRM_INLINE float* at(int64_t row, int64_t column) const {
        return base + (column / kPanel * rows + row) * kPanel + column % kPanel;
    }
    static constexpr int64_t size(int64_t rows, int64_t columns) { return panels_of(columns) * rows * kPanel; }
};

// Distributes the prefetching of the next panels, [depth, kPanel] each and `distance` floats apart, over the tiles.
class NextPanels {
public:
    NextPanels(const float* first, ptrdiff_t distance, int64_t depth, int64_t panels, int64_t tiles)
        : first_(first), distance_(distance), depth_(depth), each_((tiles + panels - 1) / panels),
          step_((kPanel + each_ - 1) / each_) {}

    // The part that the next tile prefetches.
    TRM_INLINE Prefetch next_tile() {
        const int64_t panel = tile_ >= each_, index = tile_++ - panel * each_;
        return {first_ + panel * distance_ + index * depth_ * step_, step_};
    }

private:
    const float* first_;
    ptrdiff_t distance_;
    int64_t depth_, each_;  // each_: tiles per panel
    ptrdiff_t step_;
    int64_t tile_ = 0;
};

struct NoPrefetch {
    void operator()(int64_t, int, int64_t) const {}
};

// Multiplies A [rows, depth] by a matrix [depth, panels * kPanel] in panels. Each row of the result is passed to
// finish(row, panel, vectors). `partial` [kPartialSize] stores partial sums if the depth needs several parts.
// prefetch_for(row, height, panel) is called before a tile whose rows are finished next, to prefetch what `finish`
// reads.
template <class Finish, class PrefetchFor = NoPrefetch>
TRM_INLINE void product(int64_t rows, int64_t depth, const float* a, ptrdiff_t lda, const float* b, int64_t panels,
                        float* partial, Finish&& finish, PrefetchFor&& prefetch_for = {}) {
    alignas(64) float whole[max(kTileRows, 2 * kWideRows) * kPanel];
    const int64_t parts = (depth + kDepth - 1) / kDepth;
    const int64_t part_depth = (depth + parts - 1) / parts;
    const int64_t part_panels = parts == 1 ? panels : kPartPanels;
    for (int64_t p0 = 0; p0 < panels; p0 += part_panels) {
        const int64_t p1 = min(panels, p0 + part_panels);
        for (int64_t k = 0; k < depth; k += part_depth) {
            const int64_t now = min(part_depth, depth - k);
            const bool last = k + now == depth;
            for (int64_t p = p0, wide; p < p1; p += wide) {
                wide = panels_at_once(p1 - p);
                const Right right{b + (p * depth + k) * kPanel, depth * kPanel};
                NextPanels next(right.at + wide * right.distance, right.distance, now, wide,
                                tiles_of(rows, max_rows(wide)));
                const auto run = [&](int64_t first, int height) {
                    float* c = parts == 1 ? whole : partial + first * kPartialRow + (p - p0) * kPanel;
                    const ptrdiff_t ldc = parts == 1 ? wide * kPanel : kPartialRow;
                    if (last)
                        for (int64_t q = 0; q < wide; ++q) prefetch_for(first, height, p + q);
                    tile_of<Left::kByRows>(wide, height)(now, a + first * lda + k, lda, right, c, ldc, k > 0,
                                                         next.next_tile());
                    if (!last) return;
                    for (int i = 0; i < height; ++i) {
                        for (int64_t q = 0; q < wide; ++q) {
                            Vec v[kPanelVectors];
                            TRM_UNROLL for (int j = 0; j < kPanelVectors; ++j)
                                v[j] = load(c + i * ldc + q * kPanel + j * W);
                            finish(first + i, p + q, v);
                        }
                    }
                };
                for_tiles(rows, run, max_rows(wide));
            }
        }
    }
}

// Weight gradients are computed in groups of tiles along the outputs; all tiles of a group reuse each panel of inputs.
constexpr int64_t kGroupRows = kWideRows > 0 ? 10 * kWideRows : 4 * kTileRows;
constexpr int64_t kGradientDepth = 512;
constexpr int64_t kSumBlock = 32;
// Size of the scratch of weight_gradient, with padding for the last vector.
constexpr int64_t kGradientScratch = kGroupRows * kGradientDepth + 64;

constexpr int64_t groups_of(int64_t outputs) { return (outputs + kGroupRows - 1) / kGroupRows; }

// Computes group `group` of dW [outputs, inputs] (+)= dY^T X over `rows` rows, and of db [outputs] (+)= the sums of dY.
// dy: rows, readable W floats beyond the end; x: panels; dw: rows of `ldw` floats, whole panels.
inline void weight_gradient(int64_t group, int64_t rows, int64_t outputs, int64_t inputs, const float* dy,
                            ptrdiff_t ldy, Panels x, float* dw, ptrdiff_t ldw, float* db, bool accumulate,
                            float* scratch) {
    const int64_t begin = group * kGroupRows;
    const int64_t count = min(kGroupRows, outputs - begin);
    for (int64_t k = 0; k < rows; k += kGradientDepth) {
        const int64_t now = min(kGradientDepth, rows - k);
        const bool add = accumulate || k > 0;
        // The columns of dY are packed for the tallest tiles, including those for the last panel.
        const int64_t max_height = max_rows(panels_at_once(panels_of(inputs)));
        const auto pack = [&](int64_t first, int height) {
            constexpr int kVectors = (kTileRows + W - 1) / W;
            float* packed = scratch + first * kGradientDepth;
            const float* from = dy + k * ldy + begin + first;
            Vec sums[kVectors] = {};
            // Sum in blocks: a single running sum over all rows has a larger error than autograd's bias gradient.
            for (int64_t part = 0; part < now; part += kSumBlock) {
                Vec partial[kVectors] = {};
                // Store whole vectors in order: the next row overwrites what a row writes beyond its end.
                for (int64_t r = part; r < min(now, part + kSumBlock); ++r) {
                    TRM_UNROLL for (int j = 0; j < kVectors; ++j) {
                        if (j * W >= height) break;
                        const Vec v = load(from + r * ldy + j * W);
                        store(packed + r * height + j * W, v);
                        partial[j] += v;
                    }
                }
                TRM_UNROLL for (int j = 0; j < kVectors; ++j) sums[j] += partial[j];
            }
            float totals[kVectors * W];
            for (int j = 0; j < kVectors; ++j) store(totals + j * W, sums[j]);
            for (int i = 0; i < height; ++i) {
                float& bias = db[begin + first + i];
                bias = add ? bias + totals[i] : totals[i];
            }
        };
        for_tiles(count, pack, max_height);
        for (int64_t p = 0, wide; p < panels_of(inputs); p += wide) {
            wide = panels_at_once(panels_of(inputs) - p);
            const Right right{x.at(k, p * kPanel), x.rows * kPanel};
            NextPanels next(right.at + wide * right.distance, right.distance, now, wide, tiles_of(count, max_height));
            const auto run = [&](int64_t first, int height) {
                tile_of<Left::kPacked>(wide, height)(now, scratch + first * kGradientDepth, height, right,
                                            dw + (begin + first) * ldw + p * kPanel, ldw, add, next.next_tile());
            };
            for_tiles(count, run, max_height);
        }
    }
}

}  // namespace trm::TRM_ISA
