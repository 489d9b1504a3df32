/* See turns.h. */
#include "turns.h"

#include "copy.h"
#include "kernels.h"
#include "segment.h"
#include "table.h"

static const int64_t STREAMED_BYTES = 1 << 24;

bool mpidl_stages(const mpidl_job *job) {
    return job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_REDUCE || job->kind == MPIDL_REDUCE_SCATTER;
}

bool mpidl_produces(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_BROADCAST || node->rank == job->root;
}

bool mpidl_consumes(const mpidl_node *node, const mpidl_job *job) {
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

/* Elements of a rank's block; of a kind without blocks, all. */
static int64_t block_count(const mpidl_job *job, int rank) {
    int64_t left = job->total - rank * job->count;
    return job->total == 0 || left > job->count ? job->count : left < 0 ? 0 : left;
}

/* Elements in one turn; where the slice of a rank begins, and its length. */
static int64_t slice(const mpidl_node *node, const mpidl_job *job, int64_t round, int rank, int64_t *from) {
    int64_t most = node->piece_nbytes / mpidl_itemsize(job->dtype);
    bool cut = job->kind == MPIDL_ALLREDUCE || job->kind == MPIDL_REDUCE;
    int64_t start = round * most * (cut ? node->ranks : 1);
    int64_t left = (cut ? job->count : block_count(job, rank)) - start;
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

int64_t mpidl_rounds_of(const mpidl_node *node, const mpidl_job *job) {
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

static char *at(uintptr_t memory, const mpidl_job *job, int64_t place) {
    return (char *)memory + place * mpidl_itemsize(job->dtype);
}

/* Results so large that the caches lose them before they are read. */
static bool is_streamed(const mpidl_job *job) {
    return job->count * mpidl_itemsize(job->dtype) >= STREAMED_BYTES;
}

static void fetch(mpidl_job *job, int64_t place, int64_t count, char *out) {
    if (job->segments > 0) {
        mpidl_gather_range(job, job->base + place, count, out);
    } else {
        mpidl_copy(out, at(job->input, job, place), count * mpidl_itemsize(job->dtype), false);
    }
}

void mpidl_stage(const mpidl_node *node, mpidl_job *job, int64_t round) {
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

void mpidl_produce(const mpidl_node *node, mpidl_job *job, int64_t round) {
    uint32_t number = node->rounds + (uint32_t)round;
    int64_t from, count = slice(node, job, round, node->rank, &from);
    if (count == 0) {
        return;
    }
    const int64_t item = mpidl_itemsize(job->dtype);
    char *shown = shows(node, job) ? piece_of(node, node->rank, number, node->rank) : NULL;
    char *kept = keeps(node, job) ? at(job->output, job, output_place(job, node->rank, from)) : NULL;
    char *out = shown ? shown : kept;
    if (mpidl_stages(job)) {
        reduce(node, job, number, from, count, out);
    } else {
        fetch(job, input_place(job, node->rank, from), count, out);
    }
    if (shown && kept) {
        mpidl_copy(kept, shown, count * item, is_streamed(job));
    }
}

void mpidl_consume(const mpidl_node *node, const mpidl_job *job, int64_t round, int from_rank) {
    int64_t from, count = slice(node, job, round, from_rank, &from);
    mpidl_copy(at(job->output, job, output_place(job, from_rank, from)),
               piece_of(node, from_rank, node->rounds + (uint32_t)round, from_rank), count * mpidl_itemsize(job->dtype),
               is_streamed(job));
}

static int64_t small_count(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_REDUCE_SCATTER ? job->count : job->total ? job->total : node->ranks * job->count;
}

bool mpidl_is_small(const mpidl_node *node, const mpidl_job *job) {
    return job->kind != MPIDL_AGREE && small_count(node, job) * mpidl_itemsize(job->dtype) <= node->small_nbytes;
}

void mpidl_give_small(const mpidl_node *node, mpidl_job *job, char *out) {
    if (mpidl_produces(node, job)) {
        fetch(job, 0, job->kind == MPIDL_ALLGATHER ? block_count(job, node->rank) : small_count(node, job), out);
    }
}

/* All data stand beside the announcements: every rank takes what it needs. */
void mpidl_take_small(const mpidl_node *node, mpidl_job *job) {
    const char *sources[MAX_RANKS];
    const int64_t item = mpidl_itemsize(job->dtype), nbytes = job->count * item;
    for (int rank = 0; rank < node->ranks; rank++) {
        sources[rank] = announcement_of(node, rank, node->calls)->small;
        if (job->kind == MPIDL_REDUCE_SCATTER) {
            sources[rank] += node->rank * nbytes;
        } else if (job->kind == MPIDL_ALLGATHER) {
            mpidl_copy((char *)job->output + rank * nbytes, sources[rank], block_count(job, rank) * item, false);
        }
    }
    if (job->kind == MPIDL_BROADCAST && node->rank != job->root) {
        mpidl_copy((char *)job->output, sources[job->root], nbytes, false);
    } else if (mpidl_stages(job) && keeps(node, job)) {
        int64_t count = job->kind == MPIDL_REDUCE_SCATTER ? block_count(job, node->rank) : job->count;
        mpidl_find_reduction(job->dtype, job->op)(sources, node->ranks, (char *)job->output, count, job->divisor);
    }
}
