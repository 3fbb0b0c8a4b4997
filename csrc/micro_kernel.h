// C = A B or C += A B for a few rows of A and one panel of B, or two, held in registers.
#pragma once

#include "vector.h"

namespace trm::TRM_ISA {

// What a tile fetches ahead: for every k, the cache line at `from`, then `step` floats on.
struct Ahead {
    const float* from;
    ptrdiff_t step;
};

// Fetches `columns` floats of each of `rows` rows into the first-level cache.
TRM_INLINE void fetch(const float* from, ptrdiff_t ld, int rows, int columns = kPanel) {
    for (int i = 0; i < rows; ++i)
        for (int c = 0; c < columns; c += 16) __builtin_prefetch(from + i * ld + c, 0, 3);
}

// B: rows of `ld` floats, its panels `panel` floats apart.
struct Right {
    const float* at;
    ptrdiff_t ld, panel;
};

// C [M, V W] (+)= A [M, K] B [K, V W].
//   V: the vectors of a panel, of half of one or of two. Two panels take fewer loads and pointers for as many
//     multiply-adds, which counts where another thread of the core takes its share of both (6 x 64 against 14 x 32
//     floats, AVX-512, weights of d 256 to 1,024: 4 to 8% faster on a busy machine, 0 to 2% on a quiet one).
//   Columns = false: A by rows, element (i, k) at a[i * lda + k]. Three rows share a pointer: fourteen pointers
//     would not fit the registers, and lda, 2 lda are addressing modes.
//   Columns = true: A by columns, element (i, k) at a[i + k * lda].
// The loop over k is not unrolled: by two or four it runs as fast (139 GF/s, GCC 12, one AVX-512 core), and a compiler
// that spills sums then would halve that (tests/native/test_build.py looks for spills).
//   ahead: fetched into the second-level cache meanwhile, spread over the loop: weights that come from the third level
//     otherwise hold the tile up (104 to 114 against 136 GF/s at d 256 to 512, one core, AVX-512).
template <int M, int V, bool Columns>
__attribute__((noinline)) void tile(int64_t depth, const float* a, ptrdiff_t lda, Right right, float* c, ptrdiff_t ldc,
                                    bool accumulate, Ahead ahead) {
    Vec sums[M][V];
    TRM_UNROLL for (int i = 0; i < M; ++i) TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
    constexpr int kPointers = Columns ? 1 : (M + 2) / 3;
    const float* rows[kPointers];
    TRM_UNROLL for (int g = 0; g < kPointers; ++g) rows[g] = a + 3 * g * lda;
    const float* b = right.at;
    if (accumulate) fetch(c, ldc, M, V * W);
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; ++k) {
        Vec columns[V];
        TRM_UNROLL for (int j = 0; j < V; ++j)
            columns[j] = load(b + j / kPanelVectors * right.panel + j % kPanelVectors * W);
        b += right.ld;
        __builtin_prefetch(ahead.from, 0, 2);
        ahead.from += ahead.step;
        TRM_UNROLL for (int i = 0; i < M; ++i) {
            const Vec element = splat(Columns ? rows[0][i] : rows[i / 3][(i % 3) * lda]);
            TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] += element * columns[j];
        }
        TRM_UNROLL for (int g = 0; g < kPointers; ++g) rows[g] += Columns ? lda : 1;
    }
    // C is added last: a running sum over all parts of a long product would err more.
    if (accumulate) {
        TRM_UNROLL for (int i = 0; i < M; ++i)
            TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] += load(c + i * ldc + j * W);
    }
    TRM_UNROLL for (int i = 0; i < M; ++i)
        TRM_UNROLL for (int j = 0; j < V; ++j) store(c + i * ldc + j * W, sums[i][j]);
}

using Tile = void (*)(int64_t depth, const float* a, ptrdiff_t lda, Right right, float* c, ptrdiff_t ldc,
                      bool accumulate, Ahead ahead);

template <int V, bool Columns>
struct Tiles {
    static constexpr int kMost = V > kPanelVectors ? kWideRows : kTileRows;
    Tile of_rows[kMost + 1];

    template <int M>
    constexpr void fill() {
        of_rows[M] = tile<M, V, Columns>;
        if constexpr (M > 1) fill<M - 1>();
    }
    constexpr Tiles() : of_rows{} { fill<kMost>(); }
};

// The micro-kernel by a tile's height.
template <int V, bool Columns>
inline constexpr Tiles<V, Columns> tiles{};

// Panels that a tile takes where `left` are left, the most rows of such a tile, and its micro-kernel.
constexpr int64_t panels_at_once(int64_t left) { return kWideRows > 0 && left > 1 ? 2 : 1; }
constexpr int64_t most_rows(int64_t panels) { return panels > 1 ? kWideRows : kTileRows; }
template <bool Columns>
TRM_INLINE Tile tile_of(int64_t panels, int height) {
    if constexpr (kWideRows > 0)
        if (panels > 1) return tiles<2 * kPanelVectors, Columns>.of_rows[height];
    return tiles<kPanelVectors, Columns>.of_rows[height];
}

constexpr int64_t tiles_of(int64_t rows, int64_t most = kTileRows) { return (rows + most - 1) / most; }

// Rows [0, rows) in tiles of nearly equal height: 49 rows as 13 + 12 + 12 + 12, where 14 + 14 + 14 + 7 would leave
// a tile that reads as much of B for half of the work.
template <class F>
TRM_INLINE void for_tiles(int64_t rows, F&& f, int64_t most = kTileRows) {
    const int64_t count = tiles_of(rows, most);
    for (int64_t t = 0, first = 0; t < count; ++t) {
        const int64_t height = rows / count + (t < rows % count);
        f(first, static_cast<int>(height));
        first += height;
    }
}

}  // namespace trm::TRM_ISA
