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

// Where element (i, k) of A lies: kByRows: a[i * lda + k]; kByColumns: a[i + k * lda]; kPacked: a[i + k * M].
enum class Left { kByRows, kByColumns, kPacked };

// B: a panel, or two that are `distance` floats apart.
struct Right {
    const float* at;
    ptrdiff_t distance;
};

// Rows of B that the micro-kernel's loop takes at a time. With AVX2 a row is 12 multiply-adds, 8 loads, and 6 more
// operations to prefetch, move pointers and loop, which cost most where another thread of the core takes its share of
// the issue slots: 4 rows at a time ran 16 to 22% faster there (Zen 3, weights of d 256 to 2,048), as fast on a quiet
// core; 2 rows half of that, 8 no more. AVX-512 has 28 multiply-adds a row, and was as fast by 2 and 4 (139 GF/s); with
// SSE, GCC spills sums then.
constexpr int kUnrolled = W == 8 ? 4 : 1;

// C [M, V W] (+)= A [M, K] B [K, V W].
//   V: the vectors of a panel, of half of one or of two. Two panels take fewer loads and pointers for as many
//     multiply-adds, which counts where another thread of the core takes its share of both (6 x 64 against 14 x 32
//     floats, AVX-512, weights of d 256 to 1,024: 4 to 8% faster on a busy machine, 0 to 2% on a quiet one).
//   A by rows: three of them share a pointer; fourteen pointers would not fit the registers, and lda, 2 lda are
//     addressing modes.
//   ahead: fetched into the second-level cache meanwhile, spread over the loop: weights that come from the third level
//     otherwise hold the tile up (104 to 114 against 136 GF/s at d 256 to 512, one core, AVX-512). One fetch for
//     kUnrolled rows is enough, by a single tile as by many.
// GCC must not spill sums, which would halve the speed: tests/native/test_build.py looks.
template <int M, int V, Left A>
__attribute__((noinline)) void tile(int64_t depth, const float* a, ptrdiff_t lda, Right right, float* c, ptrdiff_t ldc,
                                    bool accumulate, Ahead ahead) {
    Vec sums[M][V];
    TRM_UNROLL for (int i = 0; i < M; ++i) TRM_UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
    constexpr int kPointers = A == Left::kByRows ? (M + 2) / 3 : 1;
    // By columns, GCC would keep an offset for each element, most of them on the stack.
    constexpr int kSteps = A == Left::kByColumns ? 1 : kUnrolled;
    const ptrdiff_t next = A == Left::kByRows ? 1 : A == Left::kPacked ? M : lda;
    const float* rows[kPointers];
    TRM_UNROLL for (int g = 0; g < kPointers; ++g) rows[g] = a + 3 * g * lda;
    constexpr ptrdiff_t kRow = lesser(V, kPanelVectors) * W;
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
    if (accumulate) fetch(c, ldc, M, V * W);
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

template <int V, Left A>
struct Tiles {
    static constexpr int kMost = V > kPanelVectors ? kWideRows : kTileRows;
    Tile of_rows[kMost + 1];

    template <int M>
    constexpr void fill() {
        of_rows[M] = tile<M, V, A>;
        if constexpr (M > 1) fill<M - 1>();
    }
    constexpr Tiles() : of_rows{} { fill<kMost>(); }
};

// The micro-kernel by a tile's height.
template <int V, Left A>
inline constexpr Tiles<V, A> tiles{};

// Panels that a tile takes where `left` are left, the most rows of such a tile, and its micro-kernel.
constexpr int64_t panels_at_once(int64_t left) { return kWideRows > 0 && left > 1 ? 2 : 1; }
constexpr int64_t most_rows(int64_t panels) { return panels > 1 ? kWideRows : kTileRows; }
template <Left A>
TRM_INLINE Tile tile_of(int64_t panels, int height) {
    if constexpr (kWideRows > 0)
        if (panels > 1) return tiles<2 * kPanelVectors, A>.of_rows[height];
    return tiles<kPanelVectors, A>.of_rows[height];
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
