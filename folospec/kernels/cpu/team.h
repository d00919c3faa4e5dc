// The threads of one call, and where they meet.
//
//     others are late    spin     a few microseconds: they are all but there
//                        sleep    somebody else has their core: spinning would only use up this thread's own
//                                 share of a core, and then it would be the one that is late
//
// The threads are OpenMP's, but its barriers spin for milliseconds: on a machine whose cores are shared that
// costs more than the work (measured with a busy loop on each of two cores: a quarter of the quiet speed).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>

#include "vec.h"

namespace folospec {

constexpr int SPINS = 8192;  // about 0.1 ms; what threads wait for each other on a quiet machine is less

INLINE void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Barrier {
public:
    void meet(int64_t parts) {
        uint32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
            arrived.store(0, std::memory_order_relaxed);
            std::lock_guard<std::mutex> lock(mutex);  // nobody is between its last look and its sleep
            round.store(now + 1, std::memory_order_release);
            if (sleepers > 0) awake.notify_all();
            return;
        }
        for (int spin = 0; spin < SPINS; spin++) {
            if (round.load(std::memory_order_acquire) != now) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleepers++;
        awake.wait(lock, [&] { return round.load(std::memory_order_acquire) != now; });
        sleepers--;
    }

private:
    std::atomic<int64_t> arrived{0};
    std::atomic<uint32_t> round{0};
    std::mutex mutex;
    std::condition_variable awake;
    int64_t sleepers = 0;
};

// One thread's place among `parts`.
struct Member {
    Barrier& barrier;
    int64_t part, parts;

    void meet() const {
        if (parts > 1) barrier.meet(parts);
    }
};

// Call `body` with each of so many threads; all of them have returned when this does.
template <class Body>
void together(int64_t threads, Body body) {
    Barrier barrier;
    if (threads <= 1) return body(Member{barrier, 0, 1});
#pragma omp parallel num_threads(threads)
    {
        Member member = {barrier, omp_get_thread_num(), omp_get_num_threads()};
        body(member);
        member.meet();  // so that OpenMP's own barrier, which follows, finds them all
    }
}

// A thread's share of `count` things, in multiples of `unit`.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t unit, const Member& member) {
        int64_t units = (count + unit - 1) / unit;
        begin = std::min(count, units * member.part / member.parts * unit);
        end = std::min(count, units * (member.part + 1) / member.parts * unit);
    }
};

// Call `body(i)` for each of `count` things, `some` at a time, by whichever thread is free.
template <class Body>
void share_out(int64_t threads, int64_t count, int64_t some, Body body) {
    std::atomic<int64_t> next{0};
    together(std::min(threads, (count + some - 1) / some), [&](const Member&) {
        for (int64_t first; (first = next.fetch_add(some, std::memory_order_relaxed)) < count;)
            for (int64_t i = first; i < std::min(first + some, count); i++) body(i);
    });
}

}  // namespace folospec
