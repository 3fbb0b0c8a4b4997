// The recursion for one instruction set: the functions of kernels.h.

#include "backward.h"
#include "digest.h"

#define TRM_TEXT(x) #x
#define TRM_NAME(x) TRM_TEXT(x)

#if defined(__x86_64__)
#define TRM_IN_REGISTER(v) "+x"(v)
#elif defined(__aarch64__)
#define TRM_IN_REGISTER(v) "+w"(v)
#else
#define TRM_IN_REGISTER(v) "+m"(v)
#endif

namespace trm::TRM_ISA {

extern const Kernels table;

namespace {

// The scratch of one thread.
struct ThreadScratch {
    Scratch forward;
    AttentionScratch attention;
    float* gradient;
};

ThreadScratch lay_out_thread_scratch(Arena& arena, const Problem& p, bool backward) {
    ThreadScratch t{};
    t.forward = lay_out_scratch(arena, p.sizes, p.samples);
    if (backward) {
        if (!p.sizes.tokens()) t.attention = lay_out_attention_scratch(arena, p.sizes, p.samples.longest);
        t.gradient = arena.allocate(kGradientScratch);
    }
    return t;
}

// If calls are recomputed, the backward stores the kept data of one call at a time.
KeptCall lay_out_kept(Arena& arena, const Problem& p, bool input, bool blocks, KeptBlock* to) {
    const KeptCall call = lay_out_kept_call(arena, p.sizes, p.recursion, p.batch.rows, input);
    for (int64_t b = 0; blocks && b < p.net.blocks; ++b)
        to[b] = lay_out_kept_block(arena, p.net, p.sizes, p.batch.rows);
    return call;
}

// The buffers of a forward or backward in its workspace.
struct Workspace {
    Workspace(float* base, const Problem& p, bool backward, int threads) : arena(base), gradient{}, again{} {
        shared = lay_out_shared(arena, p.net, p.sizes, p.samples, p.recursion, p.batch.rows);
        if (backward) {
            gradient = lay_out_shared_gradient(arena, p.net, p.sizes, p.recursion, p.batch.rows, threads);
            for (int64_t b = 0; b < p.net.blocks; ++b) gradients[b] = lay_out_block_gradient(arena, p.sizes);
            if (p.recursion.recompute) again = lay_out_kept(arena, p, false, true, kept);
        }
        first_scratch_ = arena.used();
        lay_out_thread_scratch(arena, p, backward);
        scratch_size_ = arena.used() - first_scratch_;
        for (int t = 1; t < threads; ++t) lay_out_thread_scratch(arena, p, backward);
        if (!base) return;
        for (int64_t i = 0; i < forward_counters(p.net, p.recursion); ++i) shared.counters[i] = 0;
        for (int64_t i = 0; backward && i < backward_counters(p.net, p.recursion); ++i) gradient.counters[i] = 0;
        int64_t keys = 0;
        for (int64_t s = 0; s < p.samples.count; ++s) {
            shared.first_key[s] = keys;
            keys += round_up(p.samples.length(s), kPanel);
        }
    }

    ThreadScratch of_thread(float* base, const Problem& p, bool backward, int thread) const {
        Arena from(base + first_scratch_ + thread * scratch_size_);
        return lay_out_thread_scratch(from, p, backward);
    }

    Arena arena;
    Shared shared;
    SharedGradient gradient;
    BlockGradient gradients[kMaxBlocks];
    KeptCall again;
    KeptBlock kept[kMaxBlocks];

private:
    int64_t first_scratch_, scratch_size_;
};

int64_t kept_call_size(const Problem& p) {
    Arena arena(nullptr);
    KeptBlock blocks[kMaxBlocks];
    lay_out_kept(arena, p, p.recursion.recompute, !p.recursion.recompute, blocks);
    return arena.used();
}

// Returns the kept data of call `index`.
KeptCall kept_call(const Problem& p, float* kept, int64_t size, int64_t index, KeptBlock* blocks) {
    Arena arena(kept + index * size);
    return lay_out_kept(arena, p, p.recursion.recompute, !p.recursion.recompute, blocks);
}

void lay_out_packed(const Network& net, Arena& arena, bool backward, PackedBlock* blocks) {
    const Sizes sizes(net);
    for (int64_t b = 0; b < net.blocks; ++b) lay_out_block(arena, sizes, blocks[b]);
    // After all forward matrices, whose offsets therefore do not depend on `backward`.
    for (int64_t b = 0; b < net.blocks && backward; ++b) lay_out_block_backward(arena, sizes, blocks[b]);
}

int64_t packed_size(const Network& net, bool backward) {
    Arena arena(nullptr);
    PackedBlock blocks[kMaxBlocks] = {};
    lay_out_packed(net, arena, backward, blocks);
    return arena.used();
}

int64_t kept_size(const Network& net, const Batch& batch, const Recursion& recursion) {
    return kept_call_size(Problem(net, batch, recursion)) * (recursion.steps + 1);
}

int64_t workspace_size(const Network& net, const Batch& batch, const Recursion& recursion, bool backward, int threads) {
    return Workspace(nullptr, Problem(net, batch, recursion), backward, threads).arena.used();
}

void pack(const Network& net, const Block* parameters, bool backward, float* packed, int threads) {
    const Sizes sizes(net);
    Arena arena(packed);
    PackedBlock blocks[kMaxBlocks] = {};
    lay_out_packed(net, arena, backward, blocks);
    on_threads(threads, [&](Team team) {
        for (int64_t b = 0; b < net.blocks; ++b) {
            const Sources from = sources(net, sizes, parameters[b]);
            pack_matrix(from.qkv, blocks[b].qkv, team);
            pack_matrix(from.out, blocks[b].out, team);
            pack_matrix(from.up, blocks[b].up, team);
            pack_matrix(from.down, blocks[b].down, team);
            if (sizes.tokens() && parameters[b].norm1 && team.thread == 0)
                read_row(parameters[b].norm1, sizes.width, blocks[b].norm1);
        }
    });
}

void forward(const Network& net, const Batch& batch, const Recursion& recursion, const float* packed, float* kept,
             float* workspace, float* y_out, float* z_out, int threads) {
    const Problem p(net, batch, recursion);
    const Workspace w(workspace, p, false, threads);
    Arena arena(const_cast<float*>(packed));
    PackedBlock blocks[kMaxBlocks] = {};
    lay_out_packed(net, arena, false, blocks);
    const int64_t size = kept ? kept_call_size(p) : 0;
    on_threads(threads, [&](Team team) {
        Forward run(p, blocks, w.shared, w.of_thread(workspace, p, false, team.thread).forward, team);
        const int64_t d = net.width, ld = row_stride(d), steps = recursion.steps;
        KeptBlock kept_blocks[kMaxBlocks];
        for (int64_t r = run.first(); r < run.last() && steps > 0; ++r) {
            float* question = w.shared.question + r * ld;
            read_row(recursion.x + r * d, d, question);
            add_row(recursion.y + r * d, d, question);
        }
        for (int64_t i = 0; i <= steps; ++i) {
            for (int64_t r = run.first(); r < run.last(); ++r) {
                float* h = run.h(r);
                if (i == steps) {
                    if (steps > 0) write_row(h, d, z_out + r * d);
                    const float* z = steps > 0 ? z_out : recursion.z;
                    read_row(recursion.y + r * d, d, h);
                    if (z) add_row(z + r * d, d, h);
                } else {
                    if (i == 0) read_row(recursion.z + r * d, d, h);
                    const float* question = w.shared.question + r * ld;
                    for (int64_t c = 0; c < round_up(d, kPanel); c += W) store(h + c, load(h + c) + load(question + c));
                }
            }
            KeptCall call{};
            if (kept) call = kept_call(p, kept, size, i, kept_blocks);
            if (call.input)
                for (int64_t r = run.first(); r < run.last(); ++r)
                    for (int64_t c = 0; c < ld; c += W) store(call.input + r * ld + c, load(run.h(r) + c));
            const bool keep = kept && !recursion.recompute;
            run.call(i, keep ? kept_blocks : nullptr, keep ? &call : nullptr);
        }
        for (int64_t r = run.first(); r < run.last(); ++r) write_row(run.h(r), d, y_out + r * d);
    });
}

// Sums `threads` rows, `ld` doubles apart.
void sum_threads(const double* rows, int64_t ld, int threads, int64_t columns, float* to) {
    for (int64_t c = 0; c < columns; ++c) {
        double total = 0.0;
        for (int t = 0; t < threads; ++t) total += rows[t * ld + c];
        to[c] = static_cast<float>(total);
    }
}

void backward(const Network& net, const Batch& batch, const Recursion& recursion, const Block* parameters,
              const float* packed, const float* kept, float* workspace, const float* dy_out, const float* dz_out,
              float* dx, float* dy, float* dz, const Block* gradients, float* output_norm_gradient, int threads) {
    const Problem p(net, batch, recursion);
    const Workspace w(workspace, p, true, threads);
    Arena arena(const_cast<float*>(packed));
    PackedBlock blocks[kMaxBlocks] = {};
    lay_out_packed(net, arena, true, blocks);
    const int64_t size = kept_call_size(p), d = net.width, ld = row_stride(d), steps = recursion.steps;
    const SharedGradient& g = w.gradient;
    on_threads(threads, [&](Team team) {
        const ThreadScratch mine = w.of_thread(workspace, p, true, team.thread);
        Forward again(p, blocks, w.shared, mine.forward, team);
        Backward run(p, blocks, w.gradients, g, mine.forward, mine.attention, mine.gradient, team);
        const int64_t first = again.first(), last = again.last(), padded = round_up(d, kPanel);
        for (int64_t c = 0; c < padded; ++c) g.output_norm[team.thread * padded + c] = 0.0;
        for (int64_t c = 0; p.sizes.tokens() && c < net.blocks * padded; ++c)
            g.norm1[team.thread * net.blocks * padded + c] = 0.0;
        for (int64_t r = first; r < last; ++r) {
            read_row(dy_out + r * d, d, run.h(r));
            for (int64_t c = 0; c < padded; c += W) store(g.question + r * ld + c, Vec{});
        }
        KeptBlock kept_blocks[kMaxBlocks];
        for (int64_t i = steps; i >= 0; --i) {
            KeptCall call = kept_call(p, const_cast<float*>(kept), size, i, kept_blocks);
            if (recursion.recompute) {
                // Wait until all threads have finished the weight gradients that read the last call's data.
                team.wait();
                for (int64_t r = first; r < last; ++r)
                    for (int64_t c = 0; c < ld; c += W) store(again.h(r) + c, load(call.input + r * ld + c));
                again.call(i, w.kept, &w.again);
                run.call(i, w.kept, w.again);
            } else {
                run.call(i, kept_blocks, call);
            }
            for (int64_t r = first; r < last; ++r) {
                if (i == steps) {
                    write_row(run.h(r), d, dy + r * d);
                    if (dz_out) add_row(dz_out + r * d, d, run.h(r));
                } else {
                    float* question = g.question + r * ld;
                    const float* h = run.h(r);
                    for (int64_t c = 0; c < padded; c += W) store(question + c, load(question + c) + load(h + c));
                }
            }
        }
        for (int64_t r = first; r < last; ++r) {
            if (steps > 0) {
                if (dx) write_row(g.question + r * ld, d, dx + r * d);
                add_row(g.question + r * ld, d, dy + r * d);
            }
            if (dz) write_row(run.h(r), d, dz + r * d);
        }
        team.wait();
        for (int64_t b = 0; b < net.blocks; ++b) {
            const Sources from = sources(net, p.sizes, parameters[b]);
            const BlockGradient& f = w.gradients[b];
            const Block& to = gradients[b];
            finish_gradient(from.qkv, f.qkv.weight, f.qkv.ld, f.qkv.bias, to.qkv, to.qkv_bias,
                            p.sizes.tokens() ? nullptr : to.norm1, team);
            finish_gradient(from.out, f.out.weight, f.out.ld, f.out.bias, to.out, to.out_bias, nullptr, team);
            finish_gradient(from.up, f.up.weight, f.up.ld, f.up.bias, to.up, to.up_bias, to.norm2, team);
            finish_gradient(from.down, f.down.weight, f.down.ld, f.down.bias, to.down, to.down_bias, nullptr, team);
        }
        if (team.thread > 0) return;
        if (output_norm_gradient) sum_threads(g.output_norm, padded, team.count, d, output_norm_gradient);
        for (int64_t b = 0; b < net.blocks && p.sizes.tokens(); ++b)
            if (gradients[b].norm1)
                sum_threads(g.norm1 + b * padded, net.blocks * padded, team.count, d, gradients[b].norm1);
    });
}

int64_t digest_size(const Span* spans, int64_t count) {
    int64_t blocks = 0;
    for (int64_t s = 0; s < count; ++s) blocks += digest_blocks(spans[s]);
    return 2 * max(1, blocks);
}

void digest(const Span* spans, int64_t count, uint64_t* digests, int threads) {
    digests[0] = digests[1] = 0;
    on_threads(threads, [&](Team team) { digest_spans(spans, count, digests, team); });
    uint64_t totals[2] = {};
    for (int64_t i = 0; i < digest_size(spans, count); ++i) totals[i % 2] = Chains::fold(totals[i % 2], digests[i]);
    for (int i = 0; i < 2; ++i) digests[i] = totals[i];
}

void dropout_mask(const Recursion& recursion, int64_t call_block, int64_t head, int64_t first_row, int64_t rows,
                  float* mask) {
    for (int64_t r = 0; r < rows; ++r) {
        const Dropout dropout(recursion.dropout, recursion.seed, call_block, head, first_row + r);
        for (int64_t j = 0; j < rows; j += W) {
            const Vec factor = dropout.factor(j);
            for (int64_t i = j; i < min(j + W, rows); ++i) mask[r * rows + i] = factor[i - j] > 0.0f ? 1.0f : 0.0f;
        }
    }
}

// Independent multiply-adds in registers.
struct MultiplyAdds {
    static constexpr int kChains = 12, kRounds = 2048;
    static constexpr double kOperations = 2.0 * W * kChains * kRounds;

    MultiplyAdds() {
        TRM_UNROLL for (int i = 0; i < kChains; ++i) kept[i] = splat(static_cast<float>(i));
    }
    void operator()() {
        Vec sums[kChains];
        TRM_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = kept[i];
        const Vec factor = splat(0.999f), term = splat(0.001f);
        for (int k = 0; k < kRounds; ++k) {
            TRM_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
            // Keep the compiler from removing the sums.
            TRM_UNROLL for (int i = 0; i < kChains; ++i) asm volatile("" : TRM_IN_REGISTER(sums[i]));
        }
        TRM_UNROLL for (int i = 0; i < kChains; ++i) kept[i] = sums[i];
    }

    Vec kept[kChains];
};

// The micro-kernel on data in the L1 cache.
struct CachedTile {
    static constexpr int kDeep = 4096 / kPanel;
    static constexpr double kOperations = 2.0 * kTileRows * kPanel * kDeep;

    CachedTile() {
        for (float& element : a) element = 0.5f;
        for (float& element : b) element = 0.25f;
    }
    void operator()() {
        tiles<kPanelVectors, Left::kByRows>.by_height[kTileRows](kDeep, a, kDeep, {b, 0}, c, kPanel, false, {b, 0});
    }

    alignas(64) float a[kTileRows * kDeep], b[kDeep * kPanel], c[kTileRows * kPanel];
};

template <class Work>
double rate(double seconds, int threads) {
    constexpr int kMaxThreads = 1024;
    double rates[kMaxThreads] = {};
    on_threads(static_cast<int>(min(threads, kMaxThreads)), [&](Team team) {
        Work work;
        // The first 2 ms after a pause or other work are 10 to 30% slower (Zen 3).
        constexpr double kWarm = 2e-3;
        for (const double begin = omp_get_wtime(); omp_get_wtime() - begin < kWarm;) work();
        team.wait();
        const double start = omp_get_wtime();
        double now = start;
        int64_t rounds = 0;
        for (; now - start < seconds; now = omp_get_wtime()) {
            work();
            ++rounds;
        }
        rates[team.thread] = Work::kOperations * static_cast<double>(rounds) / (now - start) * 1e-9;
    });
    double total = 0.0;
    for (const double each : rates) total += each;
    return total;
}

}  // namespace

const Kernels table = {
    TRM_NAME(TRM_ISA), W, packed_size, kept_size, workspace_size, pack, digest, digest_size, forward,
    backward, dropout_mask, rate<MultiplyAdds>, rate<CachedTile>};

}  // namespace trm::TRM_ISA
