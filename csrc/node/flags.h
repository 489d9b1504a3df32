/* Counters by which processes that share memory tell each other how far they have come, and how one waits for another.
 *
 * A counter is written by its owner only and only ever grows (it may wrap around: differences stay far below 2^31).
 * What the owner wrote before it raised a counter can be read by whoever has seen the new value. Waiting first spins,
 * then gives the core away, then sleeps on a futex; docs/flag_protocol.md says why no waking is lost.
 */
#ifndef MPIDL_FLAGS_H
#define MPIDL_FLAGS_H

#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum mpidl_counter { ANNOUNCED, STAGED, PRODUCED, CONSUMED, COUNTERS };

/* One rank's. The sleepers are written by others, so they have a cache line of their own. */
typedef struct {
    _Atomic uint32_t counters[COUNTERS];
    _Atomic uint32_t gave_up; /* 1: its calls will never complete */
    char padding[64 - (COUNTERS + 1) * sizeof(uint32_t)];
    _Atomic uint32_t sleepers;
    char more_padding[64 - sizeof(uint32_t)];
} mpidl_flags;

static inline bool reached(mpidl_flags *flags, int counter, uint32_t value) {
    uint32_t now = atomic_load_explicit(&flags->counters[counter], memory_order_acquire);
    return (int32_t)(now - value) >= 0;
}

/* The exchange and the look at the sleepers are ordered against a sleeper's addition and its look at the counter: one
 * of the two sees the other.
 */
static inline void publish(mpidl_flags *flags, int counter, uint32_t value) {
    atomic_exchange(&flags->counters[counter], value);
    if (atomic_load(&flags->sleepers)) {
        syscall(SYS_futex, &flags->counters[counter], FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    }
}

static inline void sleep_until(mpidl_flags *flags, int counter, uint32_t value, int64_t nanoseconds) {
    atomic_fetch_add(&flags->sleepers, 1);
    uint32_t now = atomic_load(&flags->counters[counter]);
    if ((int32_t)(now - value) < 0) {
        struct timespec limit = {.tv_sec = nanoseconds / 1000000000, .tv_nsec = nanoseconds % 1000000000};
        syscall(SYS_futex, &flags->counters[counter], FUTEX_WAIT, now, &limit, NULL, 0);
    }
    atomic_fetch_sub(&flags->sleepers, 1);
}

static inline int64_t nanoseconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#endif
