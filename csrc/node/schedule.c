/* Collectives in a segment of shared memory, by slices, rounds and counters; docs/flag_protocol.md is the long form.
 *
 * A call begins with each rank's announcement: the signature of the call, and small data beside it. Large data then
 * goes round by round through rings of a few slots. In a round a rank *stages* the slices that others own, *produces*
 * the result of its own slice from what all staged, in rank order, and *consumes* what the others produced. Its own
 * slice is never staged. Each of the three has a counter per rank (flags.h). Kinds leave out what they do not need;
 * their counters are then raised at once, so that all counters of all ranks stand at the same number between two calls.
 *
 * Here is the order of things; what a phase does stands in phases.c, what lies where in segment.h.
 */
#include <string.h>

#include "kernels/kernels.h"
#include "node/phases.h"
#include "node/segment.h"

enum { STARTING, AGREEING, MOVING, ENDED };

/* Nanoseconds that a rank gives its core away, after spinning, before it sleeps; and how long it sleeps at most. To be
 * woken takes 50 microseconds, so a rank that has a core for itself sleeps later.
 */
enum { YIELDING = 200000, YIELDING_ALONE = 2000000, SLEEPING = 1000000 };

/* Whom a rank waits for. */
typedef struct {
    int rank, counter;
    uint32_t value;
} peer;

int64_t mpidl_segment_nbytes(int32_t ranks, int64_t small_nbytes, int64_t piece_nbytes) {
    if (ranks < 1 || ranks > MAX_RANKS || small_nbytes < 0 || small_nbytes > 1 << 30 || piece_nbytes < 64 ||
        piece_nbytes > 1 << 30 || piece_nbytes % 64) {
        return 0;
    }
    return rings_offset(ranks, small_nbytes) + ranks * SLOTS * ranks * piece_nbytes;
}

static bool waits(const mpidl_node *node, int rank, int counter, uint32_t value, peer *missing) {
    if (reached(flags_of(node, rank), counter, value)) {
        return false;
    }
    *missing = (peer){.rank = rank, .counter = counter, .value = value};
    return true;
}

/* Whether some other rank's counter is below `value`. */
static bool wait_for_any(const mpidl_node *node, int counter, uint32_t value, peer *missing) {
    for (int rank = 0; rank < node->ranks; rank++) {
        if (rank != node->rank && waits(node, rank, counter, value, missing)) {
            return true;
        }
    }
    return false;
}

static void raise(const mpidl_node *node, int counter, uint32_t value) {
    publish(flags_of(node, node->rank), counter, value);
}

static void announce(mpidl_node *node, mpidl_job *job) {
    node->calls++;
    announcement *mine = announcement_of(node, node->rank, node->calls);
    memcpy(mine->signature, job->signature, sizeof mine->signature);
    if (mpidl_is_small(node, job)) {
        int64_t started = job->segments ? nanoseconds_now() : 0; /* of flat memory it would take longer than the copy */
        mpidl_give_small(node, job, mine->small);
        job->packing += job->segments ? nanoseconds_now() - started : 0;
    }
    raise(node, ANNOUNCED, node->calls);
}

static void begin_rounds(mpidl_node *node, mpidl_job *job) {
    job->rounds = job->kind == MPIDL_AGREE || mpidl_is_small(node, job) ? 0 : mpidl_rounds_of(node, job);
    if (job->rounds == 0) {
        return;
    }
    uint32_t last = node->rounds + (uint32_t)job->rounds;
    if (!mpidl_stages(job)) {
        job->staged = job->rounds;
        raise(node, STAGED, last);
    }
    if (!mpidl_produces(node, job)) {
        job->produced = job->rounds;
        raise(node, PRODUCED, last);
    }
    if (!mpidl_consumes(node, job)) {
        job->consumed = job->rounds;
        raise(node, CONSUMED, last);
    }
}

/* Each of the three carries out one phase of one round and returns true, or sets `missing` to the rank that the phase
 * waits for and returns false.
 */
static bool try_stage(mpidl_node *node, mpidl_job *job, peer *missing) {
    uint32_t round = node->rounds + (uint32_t)job->staged;
    if (job->staged == job->rounds || wait_for_any(node, PRODUCED, round + 1 - SLOTS, missing)) {
        return false;
    }
    int64_t started = nanoseconds_now();
    mpidl_stage(node, job, job->staged++);
    job->packing += nanoseconds_now() - started;
    raise(node, STAGED, round + 1);
    return true;
}

static bool try_produce(mpidl_node *node, mpidl_job *job, peer *missing) {
    uint32_t round = node->rounds + (uint32_t)job->produced;
    if (job->produced == job->rounds || (mpidl_stages(job) && wait_for_any(node, STAGED, round + 1, missing)) ||
        wait_for_any(node, CONSUMED, round + 1 - SLOTS, missing)) {
        return false;
    }
    int64_t started = nanoseconds_now();
    mpidl_produce(node, job, job->produced++);
    job->reducing += nanoseconds_now() - started;
    raise(node, PRODUCED, round + 1);
    return true;
}

static bool try_consume(const mpidl_node *node, mpidl_job *job, peer *missing) {
    uint32_t round = node->rounds + (uint32_t)job->consumed;
    if (job->consumed == job->rounds) {
        return false;
    }
    bool one = job->kind == MPIDL_BROADCAST;
    int from = one ? job->root : (node->rank + 1 + job->taken) % node->ranks;
    if (node->ranks > 1) {
        if (waits(node, from, PRODUCED, round + 1, missing)) {
            return false;
        }
        int64_t started = nanoseconds_now();
        mpidl_consume(node, job, job->consumed, from);
        job->reducing += nanoseconds_now() - started;
    }
    if (one || ++job->taken >= node->ranks - 1) {
        job->taken = 0;
        job->consumed++;
        raise(node, CONSUMED, round + 1);
    }
    return true;
}

/* All announcements are waited for even when one differs: whoever writes its next but one may rely on it. A rank that
 * gave up has announced the call, but the others have given it up too, or will: it must not seem to succeed.
 */
static bool try_agree(mpidl_node *node, mpidl_job *job, peer *missing) {
    for (; job->agreed < node->ranks; job->agreed++) {
        if (job->agreed != node->rank && waits(node, job->agreed, ANNOUNCED, node->calls, missing)) {
            return false;
        }
        if (atomic_load_explicit(&flags_of(node, job->agreed)->gave_up, memory_order_relaxed)) {
            *missing = (peer){.rank = job->agreed, .counter = ANNOUNCED, .value = node->calls + 1};
            return false;
        }
        announcement *theirs = announcement_of(node, job->agreed, node->calls);
        job->differs |= memcmp(theirs->signature, job->signature, sizeof job->signature) != 0;
    }
    job->phase = MOVING;
    if (!job->differs) {
        if (mpidl_is_small(node, job)) {
            int64_t started = job->segments ? nanoseconds_now() : 0;
            mpidl_take_small(node, job);
            job->reducing += job->segments ? nanoseconds_now() - started : 0;
        }
        begin_rounds(node, job);
    }
    return true;
}

/* Moves the rounds on as far as they go without waiting. Afterwards `missing` is what the phase that is furthest behind
 * waits for: the rank that `missing` names can go on without anything further from this rank.
 */
static void move_rounds(mpidl_node *node, mpidl_job *job, peer *missing) {
    peer to_stage = *missing, to_produce = *missing, to_consume = *missing;
    while (try_consume(node, job, &to_consume) || try_produce(node, job, &to_produce) ||
           try_stage(node, job, &to_stage)) {
    }
    if (job->staged < job->rounds && job->staged <= job->produced && job->staged <= job->consumed) {
        *missing = to_stage;
    } else if (job->produced < job->rounds && job->produced <= job->consumed) {
        *missing = to_produce;
    } else if (job->consumed < job->rounds) {
        *missing = to_consume;
    } else {
        node->rounds += (uint32_t)job->rounds;
        job->phase = ENDED;
    }
}

/* Returns an mpidl_progress. */
static int move_on(mpidl_node *node, mpidl_job *job, peer *missing) {
    if (job->phase == STARTING) {
        announce(node, job);
        job->phase = AGREEING;
    }
    if (job->phase == AGREEING && !try_agree(node, job, missing)) {
        return MPIDL_WAITING;
    }
    if (job->phase == MOVING) {
        move_rounds(node, job, missing); /* of a call that differs there are none */
    }
    return job->phase != ENDED ? MPIDL_WAITING : job->differs ? MPIDL_DIFFERS : MPIDL_DONE;
}

static int check(const mpidl_node *node, const mpidl_job *job) {
    if (job->kind < 0 || job->kind >= MPIDL_KINDS || !node->memory ||
        !mpidl_segment_nbytes(node->ranks, node->small_nbytes, node->piece_nbytes)) {
        return MPIDL_BAD_ADDRESS;
    }
    if (job->kind == MPIDL_AGREE) {
        return MPIDL_OK;
    }
    if (job->dtype < 0 || job->dtype >= MPIDL_DTYPES || (mpidl_stages(job) && !mpidl_reduces(job->dtype, job->op)) ||
        (job->segments > 0 && !mpidl_find_kernel(job->source_dtype, job->dtype))) {
        return MPIDL_BAD_DTYPE;
    }
    if (job->count < 0 || job->count > INT64_MAX / 32 / node->ranks || job->total < 0 || job->base < 0 ||
        job->total > node->ranks * job->count || job->root < 0 || job->root >= node->ranks) {
        return MPIDL_BAD_COUNT;
    }
    return MPIDL_OK;
}

int mpidl_reduces(int dtype, int op) {
    return mpidl_find_reduction(dtype, op) != NULL;
}

/* Grows whenever something was done. */
static int64_t turns_of(const mpidl_job *job) {
    return (job->staged + job->produced + job->consumed) * MAX_RANKS + job->taken + job->agreed;
}

/* What a rank does for a moment that has nothing to do since so many nanoseconds. */
static void idle(const mpidl_node *node, int64_t since, const peer *missing) {
    if (since < node->spin) {
        for (int i = 0; i < 16; i++) {
            relax();
        }
    } else if (since < node->spin + (node->spin > 0 ? YIELDING_ALONE : YIELDING)) {
        sched_yield();
    } else {
        sleep_until(flags_of(node, missing->rank), missing->counter, missing->value, SLEEPING);
    }
}

int mpidl_node_advance(mpidl_node *node, mpidl_job *job, int64_t patience) {
    if (job->phase == STARTING) {
        job->finite = 1;
        int status = check(node, job);
        if (status != MPIDL_OK) {
            return -status;
        }
    }
    int64_t waiting_since = 0;
    while (true) {
        peer missing = {0, 0, 0};
        int64_t before = turns_of(job);
        int progress = move_on(node, job, &missing);
        if (turns_of(job) != before) {
            waiting_since = job->idle_since = 0; /* patience begins anew */
        }
        if (progress != MPIDL_WAITING || patience <= 0) {
            return progress;
        }
        int64_t now = nanoseconds_now();
        waiting_since = waiting_since ? waiting_since : now;
        job->idle_since = job->idle_since ? job->idle_since : now;
        if (now - waiting_since >= patience) {
            return progress;
        }
        idle(node, now - job->idle_since, &missing);
    }
}

int mpidl_node_repeat(mpidl_node *node, mpidl_job *job, int64_t number, const void *input, void *output,
                      int64_t patience) {
    job->signature[0] = number;
    job->input = (uintptr_t)input;
    job->output = (uintptr_t)output;
    job->phase = STARTING;
    job->agreed = job->taken = job->differs = 0;
    job->idle_since = 0;
    job->rounds = job->staged = job->produced = job->consumed = 0;
    return mpidl_node_advance(node, job, patience);
}

void mpidl_node_give_up(mpidl_node *node) {
    atomic_store(&flags_of(node, node->rank)->gave_up, 1);
}
