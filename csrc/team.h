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
struct Shares {
    Shares(Team team, int64_t all, int64_t most)
        : rows(all), chunk(most), varies(team.count > 1 && all >= 2 * most * team.count),
          fixed(varies ? all * 4 / 5 : all), first(team.first(fixed)), last(team.last(fixed)) {}

    // Calls f(first, last) for chunks that together, over all threads, are all rows. `counter` is 0 at the start.
    template <class F>
    TRM_INLINE void chunks(int64_t* counter, F&& f) const {
        const int64_t own = last - first, count = (own + chunk - 1) / chunk;
        for (int64_t c = 0; c < count; ++c) f(first + own * c / count, first + own * (c + 1) / count);
        if (!varies) return;
        const int64_t small = chunk / 4;
        for (int64_t at = fixed + small * take_item(counter); at < rows; at = fixed + small * take_item(counter))
            f(at, lesser(rows, at + small));
    }

    const int64_t rows, chunk;
    const bool varies;          // whether it takes a barrier to know that a row is done: else one thread always has it
    const int64_t fixed;        // rows that are shared out evenly,
    const int64_t first, last;  // and this thread's part of them
};

}  // namespace trm::TRM_ISA
