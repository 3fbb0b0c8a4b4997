// C = A B or C += A B for a few rows of A and one or two panels of B, with sums in registers.
#pragma once

#include "vector.h"

namespace trm::TRM_ISA {

// Data that a tile prefetches: for every k, the cache line at `from`, which then advances by `step` floats.
struct Prefetch {
    const float* from;
    ptrdiff_t step;
};

// Prefetches `columns` floats of each of `rows` rows into the L1 cache.
TRM_INLINE void prefetch(const float* from, ptrdiff_t ld, int rows, int columns = kPanel) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < columns; c += 16) __builtin_prefetch(from + i * ld + c, 0, 3);
}

// Layout of A, with element (i, k) at kByRows: a[i * lda + k]; kByColumns: a[i + k * lda]; kPacked: a[i + k * M].
enum class Left { kByRows, kByColumns, kPacked };

// B: one panel, or two panels `distance` floats apart.
struct Right {
    const float* at;
    ptrdiff_t distance;
};

// Number of rows of B per iteration of the micro-kernel's loop. With AVX2, a row needs 12 multiply-adds, 8 loads, and 6
// more operations to prefetch, advance pointers and loop, which cost most when another thread of the core competes for
// issue slots: 4 rows per iteration were 16 to 22% faster there (Zen 3, weights of d 256 to 2,048) and equally fast on
// an idle core; 2 rows gained half of that, 8 rows gained nothing more. AVX-512 has 28 multiply-adds per row, and 2 and
// 4 rows were as fast as 1 (139 GF/s). With SSE, GCC spills sums if this is more than 1.
constexpr int kUnrolled = W == 8 ? 4 : 1;

// C [M, V W] (+)= A [M, K] B [K, V W].
//   V: number of vectors: those of half a panel, of one panel or of two. Two panels need fewer loads and pointers per
//     multiply-add, which matters when another thread of the core competes for both (6 x 64 compared to 14 x 32 floats,
//     AVX-512, weights of d 256 to 1,024: 4 to 8% faster on a busy machine, 0 to 2% on an idle one).
//   A by rows: three rows share a pointer, because fourteen pointers do not fit into registers, while lda and 2 lda are
//     addressing modes.
//   ahead: prefetched into the L2 cache during the loop. Otherwise weights from the L3 cache stall the tile (104 to 114
//     compared to 136 GF/s at d 256 to 512, one core, AVX-512). One prefetch per kUnrolled rows is enough, for a single
//     tile as for many.
// GCC must not spill sums, which would halve the speed; tests/native/test_build.py checks this.
template <int M, int V, Left A>
__attribute__((noinline)) void tile(int64_t depth, const float* a, ptrdiff_t lda, Right right, float* c, ptrdiff_t ldc,
                                    bool accumulate, Prefetch ahead) {
    Vec sums[M][V];
    TRM_UNROLL for (int i = 0; i < M; ++i) TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
    constexpr int kPointers = A == Left::kByRows ? (M + 2) / 3 : 1;
    // With columns, GCC would keep one offset per element, most of them on the stack.
    constexpr int kSteps = A == Left::kByColumns ? 1 : kUnrolled;
    const ptrdiff_t next = A == Left::kByRows ? 1 : A == Left::kPacked ? M : lda;
    const float* rows[kPointers];
    TRM_UNROLL for (int g = 0; g < kPointers; ++g) rows[g] = a + 3 * g * lda;
    constexpr ptrdiff_t kRow = min(V, kPanelVectors) * W;
    const float* b = right.at;
    const auto step = [&](int u) {
        Vec columns[V];
        TRM_UNROLL for (int j = 0; j < V; ++j)
            columns[j] = load(b + u * kRow + j / kPanelVectors * right.distance + j % kPanelVectors * W);
        TRM_UNROLL for (int i = 0; i < M; ++i) {
            const float* row = A == Left::kByRows ? rows[i / 3] + (i % 3) * lda : rows[0] + i;
            const Vec element = splat(row[u * next]);
            TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] += element * columns[j];
        }
    };
    const auto move = [&](int steps) {
        b += steps * kRow;
        TRM_UNROLL for (int g = 0; g < kPointers; ++g) rows[g] += steps * next;
    };
    if (accumulate) prefetch(c, ldc, M, V * W);
    const float* const whole = b + depth / kSteps * kSteps * kRow;
#pragma GCC unroll 1
    while (b != whole) {
        __builtin_prefetch(ahead.from, 0, 2);
        ahead.from += kSteps * ahead.step;
        TRM_UNROLL for (int u = 0; u < kSteps; ++u) step(u);
        move(kSteps);
    }
#pragma GCC unroll 1
    for (int64_t left = depth % kSteps; left > 0; --left) {
        step(0);
        move(1);
    }
    // Add C last: a running sum over all parts of a long product would have a larger error.
    if (accumulate) {
        TRM_UNROLL for (int i = 0; i < M; ++i)
            TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] += load(c + i * ldc + j * W);
    }
    TRM_UNROLL for (int i = 0; i < M; ++i)
        TRM_UNROLL for (int j = 0; j < V; ++j) store(c + i * ldc + j * W, sums[i][j]);
}

using Tile = void (*)(int64_t depth, const float* a, ptrdiff_t lda, Right right, float* c, ptrdiff_t ldc,
                      bool accumulate, Prefetch ahead);

template <int V, Left A>
struct Tiles {
    static constexpr int kMaxRows = V > kPanelVectors ? kWideRows : kTileRows;
    Tile by_height[kMaxRows + 1];

    template <int M>
    constexpr void fill() {
        by_height[M] = tile<M, V, A>;
        if constexpr (M > 1) fill<M - 1>();
    }
    constexpr Tiles() : by_height{} { fill<kMaxRows>(); }
};

// The micro-kernels by tile height.
template <int V, Left A>
inline constexpr Tiles<V, A> tiles{};

// Number of panels per tile if `left` remain, maximum rows of such a tile, and its micro-kernel.
constexpr int64_t panels_at_once(int64_t left) { return kWideRows > 0 && left > 1 ? 2 : 1; }
constexpr int64_t max_rows(int64_t panels) { return panels > 1 ? kWideRows : kTileRows; }
template <Left A>
TRM_INLINE Tile tile_of(int64_t panels, int height) {
    if constexpr (kWideRows > 0)
        if (panels > 1) return tiles<2 * kPanelVectors, A>.by_height[height];
    return tiles<kPanelVectors, A>.by_height[height];
}

constexpr int64_t tiles_of(int64_t rows, int64_t max_height = kTileRows) {
    return (rows + max_height - 1) / max_height;
}

// Divides rows [0, rows) into tiles of nearly equal height: 49 rows as 13 + 12 + 12 + 12, because the last tile of
// 14 + 14 + 14 + 7 would read as much of B for half of the work.
template <class F>
TRM_INLINE void for_tiles(int64_t rows, F&& f, int64_t max_height = kTileRows) {
    const int64_t count = tiles_of(rows, max_height);
    for (int64_t t = 0, first = 0; t < count; ++t) {
        const int64_t height = rows / count + (t < rows % count);
        f(first, static_cast<int>(height));
        first += height;
    }
}

}  // namespace trm::TRM_ISA
