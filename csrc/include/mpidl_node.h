/* Collectives of ranks that share a segment of memory: the interface of schedule.c, which states the protocol.
 *
 * A call never blocks for longer than its patience, so that its caller can look after signals and lost peers between
 * two calls. mpidl/native/node.py is the only caller.
 */
#ifndef MPIDL_NODE_H
#define MPIDL_NODE_H

#include "include/mpidl.h"

enum mpidl_op { MPIDL_SUM, MPIDL_PRODUCT, MPIDL_MINIMUM, MPIDL_MAXIMUM, MPIDL_OPS };

enum mpidl_kind {
    MPIDL_AGREE, /* no data, only the signature: a barrier */
    MPIDL_ALLREDUCE,
    MPIDL_REDUCE,         /* the result goes to `root` */
    MPIDL_REDUCE_SCATTER, /* `input` holds a block of `count` elements for each rank, `total` in all */
    MPIDL_ALLGATHER,      /* `output` holds a block of `count` elements of each rank, `total` in all */
    MPIDL_BROADCAST,      /* from `input` of `root` to `output` of the others */
    MPIDL_KINDS
};

enum mpidl_progress {
    MPIDL_DONE,
    MPIDL_WAITING, /* for a peer; call again */
    MPIDL_DIFFERS /* another rank's signature is not this rank's; no data were moved, the segment can be used further */
};

/* Whether a rank writes through its caches what others read, or past them; store_policy.h says why it matters. */
enum mpidl_wish { MPIDL_BY_MEASUREMENT, MPIDL_THROUGH_CACHES, MPIDL_PAST_CACHES };

typedef struct {
    int32_t wish;    /* an mpidl_wish */
    int32_t streams; /* out: 1 if it writes past them, as far as it has measured */
    int32_t pieces;  /* written so far, as long as they are counted */
    int64_t looked;
    double costs[2]; /* nanoseconds a byte, through them and past them */
} mpidl_store_policy;

/* One rank's end of a segment. `memory` was zero before the first rank came, and is where mpidl_segment_nbytes() bytes
 * are mapped; all but `rank` and `memory` are alike on all ranks.
 */
typedef struct {
    uintptr_t memory;
    int64_t small_nbytes; /* data that travel beside the signature, in the announcement */
    int64_t piece_nbytes; /* what a rank takes from another, or gives it, in one phase; a multiple of 64 */
    int32_t rank, ranks;
    int64_t spin;                    /* nanoseconds of spinning before the core is given away */
    uint32_t calls, rounds;          /* so far */
    mpidl_store_policy store_policy; /* zero at first */
} mpidl_node;

/* One call. Flat memory has any alignment; `input` and `output` lie apart, or are equal; of an allgather `input` may be
 * this rank's place in `output`.
 *
 * With `segments` above 0 the input is no flat memory but a table as in mpidl.h, sorted by offset and without gaps, of
 * elements of `source_dtype` that are scaled and cast to `dtype` on the way; an address of 0 stands for zeros.
 */
typedef struct mpidl_job mpidl_job;
struct mpidl_job {
    int64_t signature[2]; /* number and fingerprint of the call, alike on all ranks */
    int32_t kind, op, dtype, root;
    int64_t count;
    int64_t total;  /* of a kind with blocks: where it ends the last blocks are shorter, or empty; 0: at none */
    double divisor; /* the result is divided by it, before it is rounded */
    uintptr_t input, output;
    int64_t segments;
    const uintptr_t *addresses;
    const int64_t *counts, *offsets;
    int64_t base; /* the input begins at this element of the table */
    double scale;
    int32_t source_dtype;
    int32_t finite;            /* out: 1 if all that was read from the table is, after scale and cast */
    int64_t packing, reducing; /* out: nanoseconds spent in staging, and in producing and consuming, so far */
    /* How far the call has come; zero at first. */
    int32_t phase, agreed, taken, differs;
    int64_t rounds, staged, produced, consumed;
    int64_t idle_since; /* 0: not idle */
    /* The progress thread's. */
    mpidl_job *next;
    int32_t ended, result;
};

/* 0 where the arguments make no sense. */
MPIDL_API int64_t mpidl_segment_nbytes(int32_t ranks, int64_t small_nbytes, int64_t piece_nbytes);

/* Writes op(sources[0], sources[1], ...) / divisor to `out`; a source lies apart from it, or begins where it does.
 * Returns an mpidl_status.
 */
MPIDL_API int mpidl_reduce(const uintptr_t *sources, int32_t number, uintptr_t out, int64_t count, int dtype, int op,
                           double divisor);

/* Whether the op is defined for the dtype here. */
MPIDL_API int mpidl_reduces(int dtype, int op);

/* Moves the call on, for up to `patience` nanoseconds after it last could: an mpidl_progress, or minus an mpidl_status
 * if the job itself cannot be carried out. A rank's calls are made one after the other, in an order alike on all ranks.
 */
MPIDL_API int mpidl_node_advance(mpidl_node *node, mpidl_job *job, int64_t patience);

/* Ends this rank's part for good, half-way: from now on no call of any rank is agreed on. */
MPIDL_API void mpidl_node_give_up(mpidl_node *node);

/* Begins a job anew, as call number `number` on other memory, and moves it on: one call for what is done many times. */
MPIDL_API int mpidl_node_repeat(mpidl_node *node, mpidl_job *job, int64_t number, const void *input, void *output,
                                int64_t patience);

/* A thread that moves one rank's calls on while the rank computes; no other call may be made on that node meanwhile.
 * Returns NULL if there cannot be one. Calls and node outlive it.
 */
typedef struct mpidl_progress_thread mpidl_progress_thread;
MPIDL_API mpidl_progress_thread *mpidl_progress_thread_start(mpidl_node *node);

/* Puts a call behind those given before; it is the thread's until it has ended. */
MPIDL_API void mpidl_progress_thread_give(mpidl_progress_thread *thread, mpidl_job *job);

/* What has become of a call that was given, after at most `patience` nanoseconds: as mpidl_node_advance says it. */
MPIDL_API int mpidl_progress_thread_wait(mpidl_progress_thread *thread, mpidl_job *job, int64_t patience);

/* Ends the thread, within milliseconds, in whatever call it is. */
MPIDL_API void mpidl_progress_thread_stop(mpidl_progress_thread *thread);

#endif
