// Dropout of attention weights by a hash of seed, call, head, row and key, so that the backward and any number of
// threads drop the same weights.
#pragma once

#include "vector.h"

namespace trm::TRM_ISA {

// Finalizer of SplitMix64 (Steele, Lea and Flood 2014).
TRM_INLINE uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

class Dropout {
public:
    TRM_INLINE Dropout(float probability, uint64_t seed, int64_t call, int64_t head, int64_t row)
        : threshold_(static_cast<uint32_t>(probability * 4294967296.0)), scale_(1.0f / (1.0f - probability)) {
        const uint64_t hash = mix(mix(mix(seed + static_cast<uint64_t>(call)) + static_cast<uint64_t>(head)) +
                                  static_cast<uint64_t>(row));
        low_ = static_cast<uint32_t>(hash);
        high_ = static_cast<uint32_t>(hash >> 32);
    }

    // Factors of W keys starting at `key`: 1 / (1 - probability) if kept, 0 if dropped.
    TRM_INLINE Vec factor(int64_t key) const {
        Bits x;
        TRM_UNROLL for (int i = 0; i < W; ++i) x[i] = static_cast<uint32_t>(i);
        // Multiply and shift twice, mixing in the row's hash: every input bit affects every bit of the result.
        x = (x + static_cast<uint32_t>(key)) * 0x9e3779b9u + low_;
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13) ^ high_) * 0xc2b2ae35u;
        x ^= x >> 16;
        const Vec none = {};
        return x >= (Bits{} + threshold_) ? none + scale_ : none;
    }

private:
    uint32_t threshold_, low_, high_;
    float scale_;
};

}  // namespace trm::TRM_ISA
