// A digest of weights: whether every bit of them is what it was when they were packed.
//
// Packing takes three times as long as reading, so packed weights are kept between calls, and every call looks at all of
// the weights: no pointer and no version tells who has written to memory.
#pragma once

#include "team.h"

namespace trm::TRM_ISA {

constexpr int64_t kStripe = 256;             // bytes that go into the chains at once
constexpr int64_t kDigestBlock = 64 << 10;  // bytes that one thread takes
constexpr int kChainVectors = kStripe / static_cast<int64_t>(sizeof(Bits));
static_assert(kDigestBlock % kStripe == 0);

typedef uint32_t BitsAnywhere __attribute__((vector_size(W * 4), aligned(1), may_alias));

// Two chains of 32 bits for each of the 64 words of a stripe.
//
// A step maps a chain's state, and the word that goes in, one to one: a change of one word always shows. Changes of
// several words of one chain have to cancel in both of its states, one time in 2^64. The order counts: a sum would not
// see rows change places.
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
    // One to one in either, and the order counts.
    TRM_INLINE static uint64_t fold(uint64_t folded, uint64_t next) {
        folded = (folded ^ next) * 0x9E3779B97F4A7C15u;
        return folded ^ folded >> 32;
    }
};

// The two digests of `bytes` bytes, a last stripe that is not full with zeros behind it.
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

// Two digests of each block of the spans, one behind the other, by all threads of a team.
inline void digest_spans(const Span* spans, int64_t count, uint64_t* digests, const Team& team) {
    int64_t before = 0, all = 0;
    for (int64_t s = 0; s < count; ++s) all += digest_blocks(spans[s]);
    const int64_t first = team.first(all), last = team.last(all);
    for (int64_t s = 0; s < count && before < last; ++s) {
        const int64_t blocks = digest_blocks(spans[s]);
        for (int64_t i = greater(first, before); i < lesser(last, before + blocks); ++i) {
            const int64_t at = (i - before) * kDigestBlock;
            digest_block(spans[s].data + at, lesser(kDigestBlock, spans[s].bytes - at), digests + 2 * i);
        }
        before += blocks;
    }
}

}  // namespace trm::TRM_ISA
