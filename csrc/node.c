/* Collectives in a segment of shared memory, by slices, rounds and counters; docs/flag_protocol.md is the long form.
 *
 * A call begins with each rank's announcement: its words, and small data beside them. Large data then goes round by
 * round through rings of a few slots. In a round a rank *stages* the slices that others own, *produces* the result of
 * its own slice from what all staged, in rank order, and *consumes* what the others produced. Its own slice is never
 * staged. Each of the three has a counter per rank (flags.h). Kinds leave out what they do not need; their counters are
 * then raised at once, so that all counters of all ranks stand at the same number between two calls.
 */
#include <math.h>
#include <string.h>

#include "copy.h"
#include "flags.h"
#include "kernels.h"
#include "table.h"

enum { SLOTS = 2, MAX_RANKS = 1024 }; /* slots: a power of two, since rounds wrap around */

enum { STARTING, AGREEING, MOVING, ENDED };

static const int64_t STREAMED_BYTES = 1 << 24;

/* Nanoseconds that a rank gives its core away, after spinning, before it sleeps; and how long it sleeps at most. */
enum { YIELDING = 200000, SLEEPING = 1000000 };

/* Whom a rank waits for. */
typedef struct {
    int rank, counter;
    uint32_t value;
} peer;

/* ------------------------------------------------------------------------------------------ where things are */

typedef struct {
    int64_t words[2];
    char padding[48];
    char small[];
} announcement;

static int64_t announcement_nbytes(int64_t small_nbytes) {
    return (int64_t)sizeof(announcement) + (small_nbytes + 63) / 64 * 64;
}

static int64_t rings_offset(int32_t ranks, int64_t small_nbytes) {
    int64_t used = ranks * ((int64_t)sizeof(mpidl_flags) + 2 * announcement_nbytes(small_nbytes));
    return (used + 4095) / 4096 * 4096;
}

int64_t mpidl_segment_nbytes(int32_t ranks, int64_t small_nbytes, int64_t piece_nbytes) {
    if (ranks < 1 || ranks > MAX_RANKS || small_nbytes < 0 || small_nbytes > 1 << 30 || piece_nbytes < 64 ||
        piece_nbytes > 1 << 30 || piece_nbytes % 64) {
        return 0;
    }
    return rings_offset(ranks, small_nbytes) + ranks * SLOTS * ranks * piece_nbytes;
}

static mpidl_flags *flags_of(const mpidl_node *node, int rank) {
    return (mpidl_flags *)node->memory + rank;
}

/* Two, used in turn: while this one is filled the others may still read the one of the call before. */
static announcement *announcement_of(const mpidl_node *node, int rank, uint32_t call) {
    int64_t at = node->ranks * (int64_t)sizeof(mpidl_flags);
    return (announcement *)(node->memory + at + (2 * rank + call % 2) * announcement_nbytes(node->small_nbytes));
}

/* Of `rank`'s ring: what it has staged for `other`, or, with `other` equal to `rank`, its result. */
static char *piece_of(const mpidl_node *node, int rank, uint32_t round, int other) {
    int64_t number = ((int64_t)rank * SLOTS + round % SLOTS) * node->ranks + other;
    return (char *)node->memory + rings_offset(node->ranks, node->small_nbytes) + number * node->piece_nbytes;
}

/* ------------------------------------------------------------------------------------------ what a kind does */

static bool stages(const mpidl_job *job) {
    return job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_REDUCE || job->kind == MPIDL_REDUCE_SCATTER;
}

static bool produces(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_BROADCAST || node->rank == job->root;
}

static bool consumes(const mpidl_node *node, const mpidl_job *job) {
    return job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_ALLGATHER ||
           (job->kind == MPIDL_REDUCE && node->rank == job->root) ||
           (job->kind == MPIDL_BROADCAST && node->rank != job->root);
}

/* Whether this rank's result stays with it, and whether others read it. */
static bool keeps(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_BROADCAST && (job->kind != MPIDL_REDUCE || node->rank == job->root);
}

static bool shows(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_REDUCE_SCATTER && (job->kind != MPIDL_REDUCE || node->rank != job->root);
}

/* Elements in one turn; where the slice of a rank begins, and its length. */
static int64_t slice(const mpidl_node *node, const mpidl_job *job, int64_t round, int rank, int64_t *from) {
    int64_t most = node->piece_nbytes / mpidl_itemsize(job->dtype);
    bool cut = job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_REDUCE;
    int64_t start = round * most * (cut ? node->ranks : 1);
    int64_t left = job->count - start;
    if (cut) { /* the last round's rest is cut evenly, at whole cache lines */
        int64_t share = (left + node->ranks - 1) / node->ranks;
        share = (share + 63) / 64 * 64;
        most = share < most ? share : most;
        start += rank * most;
        left -= rank * most;
    }
    *from = start;
    return left <= 0 ? 0 : left < most ? left : most;
}

static int64_t rounds_of(const mpidl_node *node, const mpidl_job *job) {
    int64_t most = node->piece_nbytes / mpidl_itemsize(job->dtype);
    if (job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_REDUCE) {
        most *= node->ranks;
    }
    return (job->count + most - 1) / most;
}

/* Where an element of rank's slice lies in the input and in the output. */
static int64_t input_place(const mpidl_job *job, int rank, int64_t from) {
    return job->kind == MPIDL_REDUCE_SCATTER ? rank * job->count + from : from;
}

static int64_t output_place(const mpidl_job *job, int rank, int64_t from) {
    return job->kind == MPIDL_ALLGATHER ? rank * job->count + from : from;
}

/* ------------------------------------------------------------------------------------------ data */

static char *at(uintptr_t memory, const mpidl_job *job, int64_t place) {
    return (char *)memory + place * mpidl_itemsize(job->dtype);
}

/* Results so large that the caches lose them before they are read. */
static bool is_streamed(const mpidl_job *job) {
    return job->count * mpidl_itemsize(job->dtype) >= STREAMED_BYTES;
}

static void fetch(mpidl_job *job, int64_t place, int64_t count, char *out) {
    if (job->segments > 0) {
        mpidl_gather_range(job, place, count, out);
    } else {
        mpidl_copy(out, at(job->input, job, place), count * mpidl_itemsize(job->dtype), false);
    }
}

static void stage(const mpidl_node *node, mpidl_job *job, int64_t round) {
    for (int step = 1; step < node->ranks; step++) { /* each begins elsewhere */
        int other = (node->rank + step) % node->ranks;
        int64_t from, count = slice(node, job, round, other, &from);
        fetch(job, input_place(job, other, from), count,
              piece_of(node, node->rank, node->rounds + (uint32_t)round, other));
    }
}

/* The own slice is read where it lies; from a table it is gathered into `out` first. */
static void reduce(const mpidl_node *node, mpidl_job *job, uint32_t round, int64_t from, int64_t count, char *out) {
    const char *sources[MAX_RANKS];
    for (int rank = 0; rank < node->ranks; rank++) {
        sources[rank] = piece_of(node, rank, round, node->rank);
    }
    sources[node->rank] = at(job->input, job, input_place(job, node->rank, from));
    if (job->segments > 0) {
        fetch(job, input_place(job, node->rank, from), count, out);
        sources[node->rank] = out;
    }
    mpidl_find_reduction(job->dtype, job->op)(sources, node->ranks, out, count, job->divisor);
}

static void produce(const mpidl_node *node, mpidl_job *job, int64_t round) {
    uint32_t number = node->rounds + (uint32_t)round;
    int64_t from, count = slice(node, job, round, node->rank, &from);
    if (count == 0) {
        return;
    }
    const int64_t item = mpidl_itemsize(job->dtype);
    char *shown = shows(node, job) ? piece_of(node, node->rank, number, node->rank) : NULL;
    char *kept = keeps(node, job) ? at(job->output, job, output_place(job, node->rank, from)) : NULL;
    char *out = shown ? shown : kept;
    if (stages(job)) {
        reduce(node, job, number, from, count, out);
    } else {
        fetch(job, input_place(job, node->rank, from), count, out);
    }
    if (shown && kept) {
        mpidl_copy(kept, shown, count * item, is_streamed(job));
    }
}

static void consume(const mpidl_node *node, const mpidl_job *job, int64_t round, int from_rank) {
    int64_t from, count = slice(node, job, round, from_rank, &from);
    mpidl_copy(at(job->output, job, output_place(job, from_rank, from)),
               piece_of(node, from_rank, node->rounds + (uint32_t)round, from_rank), count * mpidl_itemsize(job->dtype),
               is_streamed(job));
}

/* ------------------------------------------------------------------------------------------ small data */

static int64_t small_count(const mpidl_node *node, const mpidl_job *job) {
    return job->kind == MPIDL_REDUCE_SCATTER ? node->ranks * job->count : job->count;
}

static bool is_small(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_AGREE && small_count(node, job) * mpidl_itemsize(job->dtype) <= node->small_nbytes;
}

/* All data stand beside the announcements: every rank takes what it needs. */
static void take_small(const mpidl_node *node, mpidl_job *job) {
    const char *sources[MAX_RANKS];
    int64_t nbytes = job->count * mpidl_itemsize(job->dtype);
    for (int rank = 0; rank < node->ranks; rank++) {
        sources[rank] = announcement_of(node, rank, node->calls)->small;
        if (job->kind == MPIDL_REDUCE_SCATTER) {
            sources[rank] += node->rank * nbytes;
        } else if (job->kind == MPIDL_ALLGATHER) {
            memcpy((char *)job->output + rank * nbytes, sources[rank], (size_t)nbytes);
        }
    }
    if (job->kind == MPIDL_BROADCAST && node->rank != job->root) {
        memcpy((char *)job->output, sources[job->root], (size_t)nbytes);
    } else if (stages(job) && keeps(node, job)) {
        mpidl_find_reduction(job->dtype, job->op)(sources, node->ranks, (char *)job->output, job->count, job->divisor);
    }
}

/* ------------------------------------------------------------------------------------------ the order of things */

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
    memcpy(mine->words, job->words, sizeof mine->words);
    if (is_small(node, job) && produces(node, job)) {
        fetch(job, 0, small_count(node, job), mine->small);
    }
    raise(node, ANNOUNCED, node->calls);
}

static void begin_rounds(mpidl_node *node, mpidl_job *job) {
    job->rounds = job->kind == MPIDL_AGREE || is_small(node, job) ? 0 : rounds_of(node, job);
    if (job->rounds == 0) {
        return;
    }
    uint32_t last = node->rounds + (uint32_t)job->rounds;
    if (!stages(job)) {
        job->staged = job->rounds;
        raise(node, STAGED, last);
    }
    if (!produces(node, job)) {
        job->produced = job->rounds;
        raise(node, PRODUCED, last);
    }
    if (!consumes(node, job)) {
        job->consumed = job->rounds;
        raise(node, CONSUMED, last);
    }
}

/* Each of the three does one turn if it can; otherwise it says whom it waits for. */
static bool try_stage(const mpidl_node *node, mpidl_job *job, peer *missing) {
    uint32_t round = node->rounds + (uint32_t)job->staged;
    if (job->staged == job->rounds || wait_for_any(node, PRODUCED, round + 1 - SLOTS, missing)) {
        return false;
    }
    stage(node, job, job->staged++);
    raise(node, STAGED, round + 1);
    return true;
}

static bool try_produce(const mpidl_node *node, mpidl_job *job, peer *missing) {
    uint32_t round = node->rounds + (uint32_t)job->produced;
    if (job->produced == job->rounds || (stages(job) && wait_for_any(node, STAGED, round + 1, missing)) ||
        wait_for_any(node, CONSUMED, round + 1 - SLOTS, missing)) {
        return false;
    }
    produce(node, job, job->produced++);
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
        consume(node, job, job->consumed, from);
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
        job->differs |= memcmp(theirs->words, job->words, sizeof job->words) != 0;
    }
    job->phase = MOVING;
    if (!job->differs) {
        if (is_small(node, job)) {
            take_small(node, job);
        }
        begin_rounds(node, job);
    }
    return true;
}

/* Moves the rounds on as far as they go without waiting. Afterwards `missing` is what the turn that is furthest behind
 * waits for: whoever is waited for can go on without anything further from this rank.
 */
static void move_rounds(mpidl_node *node, mpidl_job *job, peer *missing) {
    peer to_stage, to_produce, to_consume;
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
    if (job->dtype < 0 || job->dtype >= MPIDL_DTYPES || (stages(job) && !mpidl_reduces(job->dtype, job->op)) ||
        (job->segments > 0 && !mpidl_find_kernel(job->source_dtype, job->dtype))) {
        return MPIDL_BAD_DTYPE;
    }
    if (job->count < 0 || job->count > INT64_MAX / 32 / node->ranks || job->root < 0 || job->root >= node->ranks) {
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

int mpidl_node_advance(mpidl_node *node, mpidl_job *job, int64_t patience) {
    if (job->phase == STARTING) {
        job->finite = 1;
        int status = check(node, job);
        if (status != MPIDL_OK) {
            return -status;
        }
    }
    peer missing = {0, 0, 0};
    int progress = move_on(node, job, &missing);
    int64_t waiting_since = 0;
    for (int64_t turn = 0; progress == MPIDL_WAITING && patience > 0; turn++) {
        int64_t now = nanoseconds_now();
        if (turn == 0) {
            waiting_since = now;
        }
        if (now - waiting_since >= patience) {
            break;
        }
        if (now - waiting_since < node->spin) {
            for (int i = 0; i < 16; i++) {
                relax();
            }
        } else if (now - waiting_since < node->spin + YIELDING) {
            sched_yield();
        } else {
            sleep_until(flags_of(node, missing.rank), missing.counter, missing.value, SLEEPING);
        }
        int64_t before = turns_of(job);
        progress = move_on(node, job, &missing);
        if (turns_of(job) != before) {
            turn = -1; /* patience begins anew */
        }
    }
    return progress;
}

int mpidl_node_repeat(mpidl_node *node, mpidl_job *job, int64_t number, const void *input, void *output,
                      int64_t patience) {
    job->words[0] = number;
    job->input = (uintptr_t)input;
    job->output = (uintptr_t)output;
    job->phase = STARTING;
    job->agreed = job->taken = job->differs = 0;
    job->rounds = job->staged = job->produced = job->consumed = 0;
    return mpidl_node_advance(node, job, patience);
}

void mpidl_node_give_up(mpidl_node *node) {
    atomic_store(&flags_of(node, node->rank)->gave_up, 1);
}
