// Products of activations with packed matrices, and weight gradients.
#pragma once

#include "micro_kernel.h"

namespace trm::TRM_ISA {

// Rows that a thread carries through a block at a time: enough to read each panel of weights but once or twice a
// thread at usual sizes, few enough that their activations stay in the second-level cache.
constexpr int64_t kChunkRows = 12 * 14 / kTileRows * kTileRows;
// Depth and columns of a part of a product: a panel of that depth fits the first-level cache or nearly so, and
// partial sums of a chunk the second.
constexpr int64_t kDepth = 512;
constexpr int64_t kPartPanels = 1024 / kPanel;
// No multiple of 4 KiB from row to row: those of a tile would share a set of the first-level cache.
constexpr int64_t kPartialRow = kPartPanels * kPanel + 16;
constexpr int64_t kPartialSize = kChunkRows * kPartialRow;

constexpr int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// A matrix [rows, columns] by panels: [columns / kPanel, rows, kPanel], the last one filled up with zeros.
struct Panels {
    float* base;
    int64_t rows;

    TRM_INLINE float* at(int64_t row, int64_t column) const {
        return base + (column / kPanel * rows + row) * kPanel + column % kPanel;
    }
    static constexpr int64_t size(int64_t rows, int64_t columns) { return panels_of(columns) * rows * kPanel; }
};

// The panels that come next, [depth, kPanel] each and `distance` floats apart: the tiles share them out among them.
class NextPanels {
public:
    NextPanels(const float* first, ptrdiff_t distance, int64_t depth, int64_t panels, int64_t tiles)
        : first_(first), distance_(distance), depth_(depth), each_((tiles + panels - 1) / panels),
          step_((kPanel + each_ - 1) / each_) {}

    // What the next tile fetches.
    TRM_INLINE Ahead share() {
        const int64_t panel = tile_ >= each_, place = tile_++ - panel * each_;
        return {first_ + panel * distance_ + place * depth_ * step_, step_};
    }

private:
    const float* first_;
    ptrdiff_t distance_;
    int64_t depth_, each_;  // tiles a panel
    ptrdiff_t step_;
    int64_t tile_ = 0;
};

struct FetchNothing {
    void operator()(int64_t, int, int64_t) const {}
};

// A [rows, depth] times a matrix [depth, panels * kPanel] given by panels. Every row of the result is handed on as
// finish(row, panel, vectors). `partial` [kPartialSize] is read where the depth takes several parts. fetch_first(row,
// height, panel) is called before a tile runs whose rows are finished next, to fetch what `finish` reads.
template <class Finish, class FetchFirst = FetchNothing>
TRM_INLINE void product(int64_t rows, int64_t depth, const float* a, ptrdiff_t lda, const float* b, int64_t panels,
                        float* partial, Finish&& finish, FetchFirst&& fetch_first = {}) {
    alignas(64) float whole[greater(kTileRows, 2 * kWideRows) * kPanel];
    const int64_t parts = (depth + kDepth - 1) / kDepth;
    const int64_t part_depth = (depth + parts - 1) / parts;
    const int64_t part_panels = parts == 1 ? panels : kPartPanels;
    for (int64_t p0 = 0; p0 < panels; p0 += part_panels) {
        const int64_t p1 = lesser(panels, p0 + part_panels);
        for (int64_t k = 0; k < depth; k += part_depth) {
            const int64_t now = lesser(part_depth, depth - k);
            const bool last = k + now == depth;
            for (int64_t p = p0, wide; p < p1; p += wide) {
                wide = panels_at_once(p1 - p);
                const Right right{b + (p * depth + k) * kPanel, depth * kPanel};
                NextPanels next(right.at + wide * right.distance, right.distance, now, wide, tiles_of(rows, most_rows(wide)));
                const auto run = [&](int64_t first, int height) {
                    float* c = parts == 1 ? whole : partial + first * kPartialRow + (p - p0) * kPanel;
                    const ptrdiff_t ldc = parts == 1 ? wide * kPanel : kPartialRow;
                    if (last)
                        for (int64_t q = 0; q < wide; ++q) fetch_first(first, height, p + q);
                    tile_of<Left::kByRows>(wide, height)(now, a + first * lda + k, lda, right, c, ldc, k > 0, next.share());
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
                for_tiles(rows, run, most_rows(wide));
            }
        }
    }
}

// The gradient of a weight is summed over rows by groups of tiles of its own rows; a panel of inputs serves them all.
constexpr int64_t kGroupRows = kWideRows > 0 ? 10 * kWideRows : 4 * kTileRows;
constexpr int64_t kGradientDepth = 512;
constexpr int64_t kSummed = 32;
// Scratch of weight_gradient, with room for the last vector's width.
constexpr int64_t kGradientScratch = kGroupRows * kGradientDepth + 64;

constexpr int64_t groups_of(int64_t outputs) { return (outputs + kGroupRows - 1) / kGroupRows; }

// Group `group` of dW [outputs, inputs] (+)= dY^T X over `rows` rows, and of db [outputs] (+)= the sums of dY.
// dy: by rows, readable W floats past its end; x: by panels; dw: rows of `ldw` floats, whole panels.
inline void weight_gradient(int64_t group, int64_t rows, int64_t outputs, int64_t inputs, const float* dy,
                            ptrdiff_t ldy, Panels x, float* dw, ptrdiff_t ldw, float* db, bool accumulate,
                            float* scratch) {
    const int64_t begin = group * kGroupRows;
    const int64_t count = lesser(kGroupRows, outputs - begin);
    for (int64_t k = 0; k < rows; k += kGradientDepth) {
        const int64_t now = lesser(kGradientDepth, rows - k);
        const bool add = accumulate || k > 0;
        // The columns of dY lie as tall tiles read them, those of the last panel too.
        const int64_t most = most_rows(panels_at_once(panels_of(inputs)));
        const auto pack = [&](int64_t first, int height) {
            constexpr int kVectors = (kTileRows + W - 1) / W;
            float* packed = scratch + first * kGradientDepth;
            const float* from = dy + k * ldy + begin + first;
            Vec sums[kVectors] = {};
            // Sums of sums: the bias of one running sum over all rows errs more than autograd's.
            for (int64_t part = 0; part < now; part += kSummed) {
                Vec partial[kVectors] = {};
                // Whole vectors, in order: what a row writes past its end, the next one overwrites.
                for (int64_t r = part; r < lesser(now, part + kSummed); ++r) {
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
        for_tiles(count, pack, most);
        for (int64_t p = 0, wide; p < panels_of(inputs); p += wide) {
            wide = panels_at_once(panels_of(inputs) - p);
            const Right right{x.at(k, p * kPanel), x.rows * kPanel};
            NextPanels next(right.at + wide * right.distance, right.distance, now, wide, tiles_of(count, most));
            const auto run = [&](int64_t first, int height) {
                tile_of<Left::kPacked>(wide, height)(now, scratch + first * kGradientDepth, height, right,
                                            dw + (begin + first) * ldw + p * kPanel, ldw, add, next.share());
            };
            for_tiles(count, run, most);
        }
    }
}

}  // namespace trm::TRM_ISA
