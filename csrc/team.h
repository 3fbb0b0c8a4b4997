// The threads of one call: torch's OpenMP, as many as torch uses.
#pragma once

#include <omp.h>

#include "vector.h"

namespace trm::TRM_ISA {

struct Team {
    int thread, count;

    // This thread's share of `items`: [first, last).
    TRM_INLINE int64_t first(int64_t items) const { return items * thread / count; }
    TRM_INLINE int64_t last(int64_t items) const { return items * (thread + 1) / count; }

    TRM_INLINE void wait() const {
        if (count > 1) {
#pragma omp barrier
        }
    }
};

// Runs f(team) on `threads` threads. One thread never enters OpenMP: in a forked child it would wait for threads
// that only the parent has.
template <class F>
inline void on_threads(int threads, F&& f) {
    if (threads <= 1) {
        f(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    f(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// The next of a list of items, for whoever comes; it must not matter who takes one. `counter` is 0 at the start.
TRM_INLINE int64_t take_item(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// How the rows of a batch are handed to the threads of a team, in chunks of at most `most` rows.
//
// Where there are many rows, a fifth of them goes in small chunks to whoever is done with its own: the cores of
// virtual machines and of hybrid CPUs differ in speed, by 20 to 30% from second to second where this was written.
class Shares {
public:
    Shares(Team team, int64_t rows, int64_t most)
        : rows_(rows), most_(most), varies(team.count > 1 && rows >= 2 * most * team.count),
          fixed_(varies ? rows * 4 / 5 : rows), first_(team.first(fixed_)), last_(team.last(fixed_)) {}

    // Calls f(first, last) for chunks that together, over all threads, are all rows. `counter` is 0 at the start.
    template <class F>
    TRM_INLINE void chunks(int64_t* counter, F&& f) const {
        const int64_t own = last_ - first_, count = (own + most_ - 1) / most_;
        for (int64_t c = 0; c < count; ++c) f(first_ + own * c / count, first_ + own * (c + 1) / count);
        if (!varies) return;
        const int64_t small = most_ / 4;
        for (int64_t at = fixed_ + small * take_item(counter); at < rows_; at = fixed_ + small * take_item(counter))
            f(at, lesser(rows_, at + small));
    }

private:
    int64_t rows_, most_;

public:
    // Whether it takes a barrier to know that a row is done: otherwise the same thread always has it.
    const bool varies;

private:
    int64_t fixed_, first_, last_;
};

}  // namespace trm::TRM_ISA
