// The threads of one call, from torch's OpenMP runtime.
#pragma once

#include <omp.h>

#include "vector.h"

namespace trm::TRM_ISA {

struct Team {
    int thread, count;

    // This thread's range of `items`: [first, last).
    TRM_INLINE int64_t first(int64_t items) const { return items * thread / count; }
    TRM_INLINE int64_t last(int64_t items) const { return items * (thread + 1) / count; }

    TRM_INLINE void wait() const {
        if (count > 1) {
#pragma omp barrier
        }
    }
};

// Runs f(team) on `threads` threads. A single thread does not enter OpenMP, which in a forked child would wait for
// threads that exist only in the parent.
template <class F>
inline void on_threads(int threads, F&& f) {
    if (threads <= 1) {
        f(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    f(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Returns the next item of a list to any thread; results must not depend on which thread gets it. `counter` starts at
// 0.
TRM_INLINE int64_t next_item(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// Distribution of the rows of a batch over the threads of a team, in chunks of at most `max_chunk` rows.
//
// If there are many rows, a fifth of them is distributed dynamically, in small chunks, to threads that have finished
// their own: the cores of virtual machines and hybrid CPUs differ in speed, by 20 to 30% from second to second on the
// development machine.
struct RowSchedule {
    RowSchedule(Team team, int64_t all, int64_t max_chunk)
        : rows(all), chunk(max_chunk), dynamic(team.count > 1 && all >= 2 * max_chunk * team.count),
          fixed(dynamic ? all * 4 / 5 : all), first(team.first(fixed)), last(team.last(fixed)) {}

    // Calls f(first, last) for chunks that cover all rows, over all threads. `counter` starts at 0.
    template <class F>
    TRM_INLINE void chunks(int64_t* counter, F&& f) const {
        const int64_t own = last - first, count = (own + chunk - 1) / chunk;
        for (int64_t c = 0; c < count; ++c) f(first + own * c / count, first + own * (c + 1) / count);
        if (!dynamic) return;
        const int64_t small = chunk / 4;
        for (int64_t at = fixed + small * next_item(counter); at < rows; at = fixed + small * next_item(counter))
            f(at, min(rows, at + small));
    }

    const int64_t rows, chunk;
    const bool dynamic;          // whether some rows are distributed dynamically, so that phases need a barrier
    const int64_t fixed;        // number of statically distributed rows
    const int64_t first, last;  // this thread's range of them
};

}  // namespace trm::TRM_ISA
