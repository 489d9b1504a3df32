/* See mpidl_center.h. First come the locks, a cache line each, then the elements, from a page's beginning on.
 *
 * A lock is 0, or the mark of its holder. Who waits spins for a moment, gives its core away, then sleeps on the word.
 * An unlock and a sleeper's look at the word are ordered as in flags.h: no waking is lost. A holder that dies leaves
 * its mark: the caller is told whose it is, and may take the lock away if the block is whole, which its version tells.
 */
#include "include/mpidl_center.h"

#include "kernels/kernels.h"
#include "node/flags.h"
#include "packing/copy.h"

enum { PAGE = 4096, SPINNING = 2000, YIELDING = 100000, SLEEPING = 1000000 }; /* the last three in nanoseconds */

static const int64_t STREAMED_BYTES = 1 << 24; /* what is so large is no longer in a cache when it is read */

typedef struct {
    _Atomic uint32_t holder;
    _Atomic uint32_t sleepers;
    _Atomic uint64_t version; /* raised before and after each change of the block: odd in between */
    char padding[64 - 2 * sizeof(uint32_t) - sizeof(uint64_t)];
} lock;

static int64_t blocks_of(int64_t count, int64_t block) {
    return (count + block - 1) / block;
}

static int64_t elements_offset(int64_t count, int64_t block) {
    return (blocks_of(count, block) * (int64_t)sizeof(lock) + PAGE - 1) / PAGE * PAGE;
}

int64_t mpidl_center_nbytes(int64_t count, int64_t block, int dtype) {
    if ((dtype != MPIDL_FLOAT32 && dtype != MPIDL_FLOAT64) || count < 0 || count > INT64_MAX / 64 || block < 64 ||
        block % 64) {
        return 0;
    }
    return elements_offset(count, block) + count * mpidl_itemsize(dtype);
}

static bool try_lock(lock *one, uint32_t mark) {
    uint32_t nobody = 0;
    return atomic_load_explicit(&one->holder, memory_order_relaxed) == 0 &&
           atomic_compare_exchange_strong(&one->holder, &nobody, mark);
}

static void sleep_while(lock *one, uint32_t holder, int64_t nanoseconds) {
    atomic_fetch_add(&one->sleepers, 1);
    if (atomic_load(&one->holder) == holder) {
        struct timespec limit = {.tv_sec = 0, .tv_nsec = nanoseconds};
        syscall(SYS_futex, &one->holder, FUTEX_WAIT, holder, &limit, NULL, 0);
    }
    atomic_fetch_sub(&one->sleepers, 1);
}

/* Whether it was got before `patience` was over; otherwise who has it stands in `waits_for`. */
static bool get_lock(lock *one, const mpidl_center *center, mpidl_pass *pass, int64_t patience) {
    int64_t since = 0;
    while (!try_lock(one, center->holder)) {
        int64_t now = nanoseconds_now();
        since = since ? since : now;
        uint32_t holder = atomic_load_explicit(&one->holder, memory_order_relaxed);
        if (now - since >= patience) {
            pass->waits_for = (int32_t)holder;
            return false;
        }
        if (now - since < SPINNING) {
            relax();
        } else if (now - since < YIELDING || !holder) {
            sched_yield();
        } else {
            sleep_while(one, holder, SLEEPING);
        }
    }
    return true;
}

static void unlock(lock *one, uint32_t mark) {
    atomic_compare_exchange_strong(&one->holder, &mark, 0); /* should it have been taken away, it is another's now */
    if (atomic_load(&one->sleepers)) {
        syscall(SYS_futex, &one->holder, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}

#define DEFINE_ADD(TYPE)                                                                                    \
    static void add_##TYPE(char *restrict held, const char *restrict values, int64_t count, double scale) { \
        const TYPE factor = (TYPE)scale;                                                                    \
        for (int64_t i = 0; i < count; i++) {                                                               \
            TYPE element, value;                                                                            \
            memcpy(&element, held + i * (int64_t)sizeof(TYPE), sizeof(TYPE));                               \
            memcpy(&value, values + i * (int64_t)sizeof(TYPE), sizeof(TYPE));                               \
            element += value * factor;                                                                      \
            memcpy(held + i * (int64_t)sizeof(TYPE), &element, sizeof(TYPE));                               \
        }                                                                                                   \
    }
DEFINE_ADD(float)
DEFINE_ADD(double)

/* What happens to `count` elements at `held`, whose lock this rank has; `at` is their place in the pass. */
static void change(const mpidl_center *center, const mpidl_pass *pass, char *held, int64_t at, int64_t count) {
    int64_t item = mpidl_itemsize(center->dtype), nbytes = count * item;
    bool streamed = pass->count * item >= STREAMED_BYTES;
    const char *values = (const char *)pass->values + at * item;
    if (pass->before) {
        mpidl_copy((char *)pass->before + at * item, held, nbytes, streamed);
    }
    if (pass->values && pass->replaces) {
        mpidl_copy(held, values, nbytes, false);
    } else if (pass->values && center->dtype == MPIDL_FLOAT32) {
        add_float(held, values, count, pass->scale);
    } else if (pass->values) {
        add_double(held, values, count, pass->scale);
    }
    if (pass->after) {
        mpidl_copy((char *)pass->after + at * item, held, nbytes, streamed);
    }
}

static int check(const mpidl_center *center, const mpidl_pass *pass) {
    if (!center->memory || !center->holder) {
        return MPIDL_BAD_ADDRESS;
    }
    if (!mpidl_center_nbytes(center->count, center->block, center->dtype)) {
        return MPIDL_BAD_DTYPE;
    }
    if (pass->start < 0 || pass->count < 0 || pass->start > center->count - pass->count || pass->done < 0 ||
        pass->done > pass->count) {
        return MPIDL_BAD_COUNT;
    }
    return MPIDL_OK;
}

int mpidl_center_move(const mpidl_center *center, mpidl_pass *pass, int64_t patience) {
    int status = check(center, pass);
    if (status != MPIDL_OK) {
        return -status;
    }
    lock *locks = (lock *)center->memory;
    char *elements = (char *)center->memory + elements_offset(center->count, center->block);
    while (pass->done < pass->count) {
        int64_t at = pass->start + pass->done, left = pass->count - pass->done;
        int64_t count = center->block - at % center->block;
        count = count < left ? count : left;
        lock *one = locks + at / center->block;
        if (!get_lock(one, center, pass, patience)) {
            return 1;
        }
        if (pass->values) {
            atomic_fetch_add(&one->version, 1);
        }
        change(center, pass, elements + at * mpidl_itemsize(center->dtype), pass->done, count);
        if (pass->values) {
            atomic_fetch_add(&one->version, 1);
        }
        unlock(one, center->holder);
        pass->done += count;
    }
    return 0;
}

int mpidl_center_take_away(const mpidl_center *center, const mpidl_pass *pass, uint32_t dead) {
    int status = check(center, pass);
    if (status != MPIDL_OK) {
        return -status;
    }
    if (pass->done == pass->count) {
        return 0;
    }
    lock *one = (lock *)center->memory + (pass->start + pass->done) / center->block;
    if (atomic_load(&one->holder) != dead) {
        return 0;
    }
    if (atomic_load(&one->version) % 2) {
        return atomic_load(&one->holder) == dead; /* or another took it away meanwhile, and is changing the block */
    }
    atomic_compare_exchange_strong(&one->holder, &dead, 0); /* who sleeps on it looks again within a millisecond */
    return 0;
}
