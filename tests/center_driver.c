/* A variable in shared memory with threads standing in for ranks, for the sanitizers: additions, copies before and
 * after them, reads and replacements, all at once, over ranges that begin and end anywhere. Whole numbers: sums are
 * exact.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "include/mpidl_center.h"

enum { THREADS = 4, COUNT = 1000, BLOCK = 64, ROUNDS = 400, OWN = 32 };

typedef struct {
    mpidl_center center;
    int rank, mistakes;
} worker;

static void move(const mpidl_center *center, mpidl_pass pass) {
    int64_t patience = pass.start % 2 ? 1000000 : 0;
    while (mpidl_center_move(center, &pass, patience) == 1) {
        sched_yield();
    }
}

/* All elements but the last OWN ones of each thread are added to by everybody; those only their owner replaces. */
static void *work(void *argument) {
    worker *self = argument;
    int64_t shared = COUNT - THREADS * OWN;
    double values[COUNT], before[COUNT], after[COUNT], own[OWN];
    for (int64_t i = 0; i < COUNT; i++) {
        values[i] = 2 * (self->rank + 1);
    }
    for (int round = 0; round < ROUNDS; round++) {
        int64_t start = (round * 37 + self->rank * 211) % shared, count = shared - start;
        for (int part = 0; part < 2; part++) { /* from there to the end, and the rest: each element once */
            move(&self->center, (mpidl_pass){.start = part ? 0 : start,
                                             .count = part ? start : count,
                                             .scale = 0.5,
                                             .values = (uintptr_t)values,
                                             .before = (uintptr_t)before,
                                             .after = (uintptr_t)after});
            for (int64_t i = 0; i < (part ? start : count); i++) {
                self->mistakes += after[i] != before[i] + self->rank + 1; /* nobody came between */
            }
        }
        for (int64_t i = 0; i < OWN; i++) {
            own[i] = round * 100 + (double)i;
        }
        int64_t mine = shared + self->rank * OWN;
        move(&self->center, (mpidl_pass){.start = mine, .count = OWN, .values = (uintptr_t)own, .replaces = 1});
        move(&self->center, (mpidl_pass){.start = 0, .count = COUNT, .after = (uintptr_t)after});
        self->mistakes += memcmp(after + mine, own, sizeof own) != 0;
    }
    return NULL;
}

static int refused(const mpidl_center *center, mpidl_pass pass) {
    return mpidl_center_move(center, &pass, 0) < 0;
}

int main(void) {
    int64_t nbytes = mpidl_center_nbytes(COUNT, BLOCK, MPIDL_FLOAT64);
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, (size_t)nbytes)) {
        return 2;
    }
    memset(memory, 0, (size_t)nbytes);
    worker workers[THREADS];
    pthread_t threads[THREADS];
    int mistakes = 0;
    for (int rank = 0; rank < THREADS; rank++) {
        workers[rank] = (worker){{(uintptr_t)memory, COUNT, BLOCK, MPIDL_FLOAT64, (uint32_t)rank + 1}, rank, 0};
        pthread_create(threads + rank, NULL, work, workers + rank);
    }
    for (int rank = 0; rank < THREADS; rank++) {
        pthread_join(threads[rank], NULL);
        mistakes += workers[rank].mistakes;
    }
    double found[COUNT];
    move(&workers[0].center, (mpidl_pass){.count = COUNT, .after = (uintptr_t)found});
    for (int64_t i = 0; i < COUNT - THREADS * OWN; i++) {
        mistakes += found[i] != ROUNDS * THREADS * (THREADS + 1) / 2.0;
    }
    mistakes += !refused(&workers[0].center, (mpidl_pass){.start = 1, .count = COUNT}) +
                !refused(&workers[0].center, (mpidl_pass){.start = -1, .count = 1}) +
                (mpidl_center_nbytes(COUNT, BLOCK, MPIDL_INT32) != 0) +
                (mpidl_center_nbytes(COUNT, 63, MPIDL_FLOAT64) != 0);
    /* A holder that has died: its lock goes if the block is whole, and only if it is still its own. */
    _Atomic uint32_t *holder = memory;
    _Atomic uint64_t *version = (_Atomic uint64_t *)memory + 1;
    mpidl_pass stopped = {.count = 1};
    *holder = 99;
    mistakes += *version % 2 != 0 || *version < ROUNDS * THREADS;
    mistakes += mpidl_center_take_away(&workers[0].center, &stopped, 98) != 0 || *holder != 99;
    *version += 1;
    mistakes += mpidl_center_take_away(&workers[0].center, &stopped, 99) != 1 || *holder != 99;
    *version += 1;
    mistakes += mpidl_center_take_away(&workers[0].center, &stopped, 99) != 0 || *holder != 0;
    free(memory);
    printf("%d threads, %d rounds of additions, copies and replacements: %d mistakes\n", THREADS, ROUNDS, mistakes);
    return mistakes ? 1 : 0;
}
