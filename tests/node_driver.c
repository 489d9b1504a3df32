/* Collectives in a segment with threads standing in for ranks, for the sanitizers: every kind, many calls behind each
 * other, pieces so small that a call takes many rounds. All values are whole numbers, so that results are exact.
 */
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "include/mpidl_node.h"
#include "node/store_policy.h"

enum { CALLS = 200, MOST = 3000, MAX = 8 };

typedef struct {
    mpidl_node node;
    mpidl_progress_thread *progress_thread; /* or NULL: the rank's own thread does everything */
    int mistakes, differing;
} rank_state;

static unsigned mixed(unsigned a) { /* the same numbers on every rank */
    a = (a ^ 61u) ^ (a >> 16);
    a *= 9u;
    a ^= a >> 4;
    a *= 0x27d4eb2du;
    return a ^ (a >> 15);
}

static float value(int rank, int call, int64_t i) {
    return (float)((rank + 1) * (int)(mixed((unsigned)(call * 7919 + i)) % 100));
}

static int run(rank_state *state, mpidl_job *job) {
    int progress;
    mpidl_node *node = &state->node;
    int64_t patience = mixed((unsigned)(node->rank + job->signature[0])) % 2 ? 1000000 : 0;
    if (state->progress_thread) {
        mpidl_progress_thread_give(state->progress_thread, job);
    }
    do {
        progress = state->progress_thread ? mpidl_progress_thread_wait(state->progress_thread, job, patience)
                                          : mpidl_node_advance(node, job, patience);
        if (!patience) {
            sched_yield();
        }
    } while (progress == MPIDL_WAITING);
    return progress;
}

static bool has_blocks(const mpidl_job *job) {
    return job->kind == MPIDL_REDUCE_SCATTER || job->kind == MPIDL_ALLGATHER;
}

/* Elements of all blocks together, and of rank's. */
static int64_t total_of(const mpidl_job *job, int ranks) {
    return !has_blocks(job) ? job->count : job->total ? job->total : ranks * job->count;
}

static int64_t block_of(const mpidl_job *job, int rank, int ranks) {
    int64_t left = total_of(job, ranks) - rank * job->count;
    return !has_blocks(job) || left > job->count ? job->count : left < 0 ? 0 : left;
}

/* What rank `rank` of `ranks` must find at `i`. */
static float expected(const mpidl_job *job, int rank, int ranks, int call, int64_t i) {
    if (job->kind == MPIDL_ALLGATHER) {
        return value((int)(i / job->count), call, i % job->count);
    }
    if (job->kind == MPIDL_BROADCAST) {
        return value(job->root, call, i);
    }
    int64_t place = job->kind == MPIDL_REDUCE_SCATTER ? rank * job->count + i : i;
    float sum = 0;
    for (int r = 0; r < ranks; r++) {
        sum += value(r, call, place);
    }
    return sum;
}

static void *rank_main(void *argument) {
    rank_state *state = argument;
    mpidl_node *node = &state->node;
    static __thread float input[MOST * MAX], output[MOST * MAX];
    for (int call = 0; call < CALLS; call++) {
        unsigned dice = mixed((unsigned)call);
        mpidl_job job = {
            .signature = {call, dice}, .kind = (int32_t)(dice % MPIDL_KINDS), .dtype = MPIDL_FLOAT32, .op = MPIDL_SUM};
        job.root = (int32_t)(dice / 8 % (unsigned)node->ranks);
        job.count = dice / 64 % 3 ? dice / 64 % MOST : dice / 64 % 20;
        job.divisor = 1;
        if (has_blocks(&job) && dice / 512 % 2) { /* the last blocks are shorter, or empty */
            job.total = job.count * (1 + dice / 1024 % (unsigned)node->ranks) - job.count / 3;
        }
        bool in_place = job.kind == MPIDL_ALLREDUCE && call % 3 == 0;
        int64_t given =
            job.kind == MPIDL_REDUCE_SCATTER ? total_of(&job, node->ranks) : block_of(&job, node->rank, node->ranks);
        for (int64_t i = 0; i < given; i++) {
            input[i] = value(node->rank, call, i);
        }
        job.input = (uintptr_t)input;
        job.output = (uintptr_t)(in_place ? input : output);
        if (call % 50 == 49 && node->rank == 1) {
            job.signature[1]++; /* one rank makes another call: all must learn of it, and be able to go on */
        }
        int progress = run(state, &job);
        if (call % 50 == 49 && node->ranks > 1) {
            state->differing += progress == MPIDL_DIFFERS;
            continue;
        }
        state->mistakes += progress != MPIDL_DONE;
        bool has = job.kind != MPIDL_AGREE && (job.kind != MPIDL_REDUCE || node->rank == job.root) &&
                   (job.kind != MPIDL_BROADCAST || node->rank != job.root);
        int64_t got =
            job.kind == MPIDL_ALLGATHER ? total_of(&job, node->ranks) : block_of(&job, node->rank, node->ranks);
        for (int64_t i = 0; has && i < got; i++) {
            state->mistakes += (in_place ? input : output)[i] != expected(&job, node->rank, node->ranks, call, i);
        }
    }
    return NULL;
}

/* `threads`: of every two ranks one, or both, or none has one. */
static int check(int ranks, int64_t small, int64_t piece, int helped) {
    size_t nbytes = (size_t)mpidl_segment_nbytes(ranks, small, piece);
    void *memory = aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096);
    memset(memory, 0, nbytes);
    pthread_t threads[MAX];
    rank_state states[MAX];
    for (int rank = 0; rank < ranks; rank++) {
        states[rank] = (rank_state){.node = {.memory = (uintptr_t)memory,
                                             .small_nbytes = small,
                                             .piece_nbytes = piece,
                                             .rank = rank,
                                             .ranks = ranks,
                                             .spin = rank % 2 ? 2000 : 0,
                                             .rounds = UINT32_MAX - 100,
                                             .store_policy = {.wish = (rank + ranks) % 3},
                                             .calls = 0}};
    }
    /* Counters begin just below the number at which they wrap around. */
    for (int rank = 0; rank < ranks; rank++) {
        uint32_t *counters = (uint32_t *)((char *)memory + 128 * rank);
        counters[1] = counters[2] = counters[3] = UINT32_MAX - 100;
    }
    for (int rank = 0; rank < ranks; rank++) {
        states[rank].progress_thread = rank % 2 < helped ? mpidl_progress_thread_start(&states[rank].node) : NULL;
        pthread_create(&threads[rank], NULL, rank_main, &states[rank]);
    }
    int wrong = 0;
    for (int rank = 0; rank < ranks; rank++) {
        pthread_join(threads[rank], NULL);
        if (states[rank].progress_thread) {
            mpidl_progress_thread_stop(states[rank].progress_thread);
        }
        wrong += states[rank].mistakes + (ranks > 1 && states[rank].differing != CALLS / 50);
    }
    free(memory);
    if (wrong) {
        printf("%d ranks, small %ld, piece %ld, progress threads %d: %d mistakes\n", ranks, (long)small, (long)piece,
               helped, wrong);
    }
    return wrong;
}

/* Of a machine on which writing through the caches takes `cost` nanoseconds a byte, and past them 1. Every seventh
 * piece takes ten times as long.
 */
static int streams_at(mpidl_store_policy *policy, double cost, int64_t *now) {
    for (int piece = 0; piece < 5000; piece++) {
        bool streamed = mpidl_choose_stores(policy, *now);
        int64_t took = (int64_t)(65536 * (streamed ? 1 : cost)) * (piece % 7 ? 1 : 10);
        mpidl_note_stores(policy, streamed, took, 65536);
        *now += took;
    }
    return mpidl_writes_past_caches(policy);
}

static int check_store_policy(void) {
    mpidl_store_policy policy = {0};
    int64_t now = 1;
    int wrong = streams_at(&policy, 0.5, &now) + streams_at(&policy, 1.3, &now) + !streams_at(&policy, 7, &now);
    wrong += !streams_at(&policy, 2.7, &now) + streams_at(&policy, 1.3, &now) + streams_at(&policy, 2.2, &now);
    policy.wish = MPIDL_PAST_CACHES;
    wrong += !mpidl_choose_stores(&policy, now);
    if (wrong) {
        printf("the choice between the caches and past them: %d mistakes\n", wrong);
    }
    return wrong;
}

int main(void) {
    int wrong = check_store_policy();
    for (int ranks = 1; ranks <= 5; ranks++) {
        wrong += check(ranks, 64, 64, 0) + check(ranks, 4096, 512, 1) + check(ranks, 0, 1024, 2);
    }
    printf("collectives of threads: %s\n", wrong ? "WRONG" : "right");
    return wrong != 0;
}
