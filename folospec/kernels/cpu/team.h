// The threads of one call, and how they share its work.
//
//     part 0   ####====----        # done   = being done   - to be claimed
//     part 1   ##==--------        Everyone claims pieces of its own part first, then of the others'.
//
// A phase is over when all its pieces are done, whoever did them: a thread that has no core for now is waited
// for only if it has a piece in its hands. On a machine whose cores other programs use too, meeting at barriers
// costs a turn of the scheduler each time (measured with a busy loop on each of two cores: a quarter of the
// quiet speed, where half would be fair). Who has to wait spins for a short while, then sleeps: to go on spinning
// would only use up this thread's own share of a core, and then it would be the one that is late.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>

#include "vec.h"

namespace folospec {

constexpr int64_t MAX_THREADS = 256;
constexpr int64_t PIECES = 8;  // of a thread's part of a phase, at most
constexpr int SPINS = 2048;    // some 20 to 80 microseconds; on a quiet machine threads wait less

INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What the threads of a call have in common. Counts go on from phase to phase: what a count was when a phase
// began is known to every thread, since all go through the same phases.
class Team {
public:
    struct alignas(64) Count {
        std::atomic<int64_t> value{0};
    };
    Count claimed[MAX_THREADS];  // pieces of each part

    void finish(int64_t pieces, int64_t all) {
        if (finished.value.fetch_add(pieces) + pieces < all || sleepers == 0) return;
        { std::lock_guard<std::mutex> lock(mutex); }  // nobody is between its last look and its sleep
        awake.notify_all();
    }

    // Returns when so many pieces are done.
    void wait(int64_t all) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (finished.value.load(std::memory_order_acquire) >= all) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleepers++;
        awake.wait(lock, [&] { return finished.value.load() >= all; });
        sleepers--;
    }

private:
    Count finished;
    std::atomic<int64_t> sleepers{0};
    std::mutex mutex;
    std::condition_variable awake;
};

// One thread of a team.
class Member {
public:
    const int64_t part, parts;

    Member(Team& team, int64_t part, int64_t parts) : part(part), parts(parts), team(team) {}

    // Go through a phase: `body(begin, end)` for all of 0 .. count - 1, in multiples of `unit`. All of it is
    // done when this returns, by this thread or by others. Every member goes through the same phases.
    template <class Body>
    void share(int64_t count, int64_t unit, Body body) {
        if (parts == 1) return body(0, count);
        int64_t units = (count + unit - 1) / unit;
        int64_t pieces = std::min(units, parts * PIECES);
        finished += pieces;
        for (int64_t turn = 0; turn < parts; turn++) {
            int64_t whose = (part + turn) % parts, first = pieces * whose / parts;
            int64_t begin = begun[whose], end = begin + pieces * (whose + 1) / parts - first;
            begun[whose] = end;
            int64_t done = 0;
            for (int64_t piece; (piece = claim(team.claimed[whose].value, end)) < end; done++) {
                int64_t number = first + piece - begin;
                body(units * number / pieces * unit, std::min(count, units * (number + 1) / pieces * unit));
            }
            if (done > 0) team.finish(done, finished);
        }
        if (pieces > 0) team.wait(finished);
    }

private:
    Team& team;
    int64_t finished = 0;
    int64_t begun[MAX_THREADS] = {};

    // The next piece, or `end` if there is none.
    static int64_t claim(std::atomic<int64_t>& claimed, int64_t end) {
        int64_t piece = claimed.load(std::memory_order_relaxed);
        while (piece < end && !claimed.compare_exchange_weak(piece, piece + 1)) {}
        return std::min(piece, end);
    }
};

// Call `body` with every member of a team of so many threads; all have returned when this does.
template <class Body>
void together(int64_t threads, Body body) {
    Team team;
    if (threads <= 1) {
        Member alone(team, 0, 1);
        return body(alone);
    }
#pragma omp parallel num_threads(std::min(threads, MAX_THREADS))
    {
        Member member(team, omp_get_thread_num(), omp_get_num_threads());
        body(member);
    }
}

// Call `body(i)` for each of `count` things, by whichever thread is free.
template <class Body>
void share_out(int64_t threads, int64_t count, Body body) {
    together(std::min(threads, count), [&](Member& member) {
        member.share(count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) body(i);
        });
    });
}

}  // namespace folospec
