// A digest of weights, which shows whether they have changed since they were packed.
//
// Packing takes three times as long as reading, so packed weights are cached between calls. Every call reads all
// weights, because no pointer or version counter detects every write to memory.
#pragma once

#include "team.h"

namespace trm::TRM_ISA {

constexpr int64_t kStripe = 256;             // bytes added to the chains at once
constexpr int64_t kDigestBlock = 64 << 10;  // bytes per work item of a thread
constexpr int kChainVectors = kStripe / static_cast<int64_t>(sizeof(Bits));
static_assert(kDigestBlock % kStripe == 0);

typedef uint32_t BitsAnywhere __attribute__((vector_size(W * 4), aligned(1), may_alias));

// Two 32-bit chains for each of the 64 words of a stripe.
//
// Each step is a bijection of the chain's state and of the input word, so a change of one word is always detected.
// Changes of several words of a chain go undetected only if they cancel in both states, with probability 2^-64. The
// order matters, because a sum would not detect swapped rows.
struct Chains {
    Bits first[kChainVectors], second[kChainVectors];

    TRM_INLINE Chains() {
        for (int v = 0; v < kChainVectors; ++v) {
            for (int i = 0; i < W; ++i) {
                first[v][i] = 0x9E3779B1u * static_cast<uint32_t>(v * W + i + 1);
                second[v][i] = ~first[v][i];
            }
        }
    }

    TRM_INLINE void add(const char* stripe) {
        TRM_UNROLL for (int v = 0; v < kChainVectors; ++v) {
            const Bits word = *reinterpret_cast<const BitsAnywhere*>(stripe + v * sizeof(Bits));
            const Bits a = (first[v] ^ word) * 0x85EBCA77u, b = (second[v] ^ word) * 0xC2B2AE3Du;
            first[v] = a << 15 | a >> 17;
            second[v] = b << 11 | b >> 21;
        }
    }

    static uint64_t fold(const Bits* chains) {
        uint64_t folded = 0, pair;
        for (int64_t at = 0; at < kStripe; at += sizeof(pair)) {
            __builtin_memcpy(&pair, reinterpret_cast<const char*>(chains) + at, sizeof(pair));
            folded = fold(folded, pair);
        }
        return folded;
    }
    // A bijection in each argument that depends on the order.
    TRM_INLINE static uint64_t fold(uint64_t folded, uint64_t next) {
        folded = (folded ^ next) * 0x9E3779B97F4A7C15u;
        return folded ^ folded >> 32;
    }
};

// Computes the two digests of `bytes` bytes. An incomplete last stripe is padded with zeros.
inline void digest_block(const char* data, int64_t bytes, uint64_t* digests) {
    Chains chains;
    const int64_t whole = bytes / kStripe * kStripe;
    for (int64_t at = 0; at < whole; at += kStripe) chains.add(data + at);
    if (whole < bytes) {
        char last[kStripe] = {};
        __builtin_memcpy(last, data + whole, static_cast<size_t>(bytes - whole));
        chains.add(last);
    }
    digests[0] = Chains::fold(chains.first);
    digests[1] = Chains::fold(chains.second);
}

inline int64_t digest_blocks(const Span& span) { return (span.bytes + kDigestBlock - 1) / kDigestBlock; }

// Computes two digests of each block of the spans, one after another, with all threads of a team.
inline void digest_spans(const Span* spans, int64_t count, uint64_t* digests, const Team& team) {
    int64_t before = 0, all = 0;
    for (int64_t s = 0; s < count; ++s) all += digest_blocks(spans[s]);
    const int64_t first = team.first(all), last = team.last(all);
    for (int64_t s = 0; s < count && before < last; ++s) {
        const int64_t blocks = digest_blocks(spans[s]);
        for (int64_t i = max(first, before); i < min(last, before + blocks); ++i) {
            const int64_t at = (i - before) * kDigestBlock;
            digest_block(spans[s].data + at, min(kDigestBlock, spans[s].bytes - at), digests + 2 * i);
        }
        before += blocks;
    }
}

}  // namespace trm::TRM_ISA
