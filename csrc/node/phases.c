/* See phases.h. */
#include "node/phases.h"

#include "kernels/kernels.h"
#include "node/segment.h"
#include "node/store_policy.h"
#include "packing/copy.h"
#include "packing/gather_range.h"

static const int64_t STREAMED_BYTES = 1 << 24;

/* What goes past the caches is made in the first of them, a part of so many bytes at a time. */
enum { PART_NBYTES = 8192 };

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

/* Elements in one phase; where the slice of a rank begins, and its length. */
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

static int64_t part_of(const mpidl_job *job, int64_t left) {
    int64_t most = PART_NBYTES / mpidl_itemsize(job->dtype);
    return left < most ? left : most;
}

/* A piece of the input, for others to read. */
static void show(mpidl_node *node, mpidl_job *job, int64_t place, int64_t count, char *piece) {
    const int64_t item = mpidl_itemsize(job->dtype), started = nanoseconds_now();
    bool streamed = mpidl_choose_stores(&node->store_policy, started);
    if (!streamed) {
        fetch(job, place, count, piece);
    } else if (job->segments == 0) {
        mpidl_copy(piece, at(job->input, job, place), count * item, true);
    } else {
        _Alignas(64) char part[PART_NBYTES];
        for (int64_t done = 0, some; done < count; done += some) {
            some = part_of(job, count - done);
            fetch(job, place + done, some, part);
            mpidl_copy(piece + done * item, part, some * item, true);
        }
    }
    mpidl_note_stores(&node->store_policy, streamed, nanoseconds_now() - started, count * item);
}

void mpidl_stage(mpidl_node *node, mpidl_job *job, int64_t round) {
    for (int step = 1; step < node->ranks; step++) { /* each begins elsewhere */
        int other = (node->rank + step) % node->ranks;
        int64_t from, count = slice(node, job, round, other, &from);
        show(node, job, input_place(job, other, from), count,
             piece_of(node, node->rank, node->rounds + (uint32_t)round, other));
    }
}

/* Elements [skipped, skipped + count) of the own slice, which begins at `from`. It is read where it lies; from a table
 * it is gathered into `out` first.
 */
static void reduce(const mpidl_node *node, mpidl_job *job, uint32_t round, int64_t from, int64_t skipped, int64_t count,
                   char *out) {
    const char *sources[MAX_RANKS];
    for (int rank = 0; rank < node->ranks; rank++) {
        sources[rank] = piece_of(node, rank, round, node->rank) + skipped * mpidl_itemsize(job->dtype);
    }
    int64_t place = input_place(job, node->rank, from + skipped);
    sources[node->rank] = at(job->input, job, place);
    if (job->segments > 0) {
        fetch(job, place, count, out);
        sources[node->rank] = out;
    }
    mpidl_find_reduction(job->dtype, job->op)(sources, node->ranks, out, count, job->divisor);
}

/* The result of the own slice, for others to read past the caches; `kept` may be NULL. */
static void reduce_and_show(const mpidl_node *node, mpidl_job *job, uint32_t round, int64_t from, int64_t count,
                            char *shown, char *kept) {
    const int64_t item = mpidl_itemsize(job->dtype);
    _Alignas(64) char part[PART_NBYTES];
    for (int64_t done = 0, some; done < count; done += some) {
        some = part_of(job, count - done);
        reduce(node, job, round, from, done, some, part);
        mpidl_copy(shown + done * item, part, some * item, true);
        if (kept) {
            mpidl_copy(kept + done * item, part, some * item, is_streamed(job));
        }
    }
}

/* What is shown of the input, where it belongs in the output; not from the ring, which may be out of the caches. */
static void keep_input(mpidl_job *job, int64_t place, int64_t count, char *kept) {
    if (kept && job->segments > 0) {
        fetch(job, place, count, kept);
    } else if (kept && kept != at(job->input, job, place)) {
        mpidl_copy(kept, at(job->input, job, place), count * mpidl_itemsize(job->dtype), is_streamed(job));
    }
}

void mpidl_produce(mpidl_node *node, mpidl_job *job, int64_t round) {
    uint32_t number = node->rounds + (uint32_t)round;
    int64_t from, count = slice(node, job, round, node->rank, &from);
    if (count == 0) {
        return;
    }
    char *shown = shows(node, job) ? piece_of(node, node->rank, number, node->rank) : NULL;
    char *kept = keeps(node, job) ? at(job->output, job, output_place(job, node->rank, from)) : NULL;
    if (!mpidl_stages(job)) {
        int64_t place = input_place(job, node->rank, from);
        show(node, job, place, count, shown);
        keep_input(job, place, count, kept);
        return;
    }
    if (shown && mpidl_writes_past_caches(&node->store_policy)) {
        reduce_and_show(node, job, number, from, count, shown, kept);
        return;
    }
    reduce(node, job, number, from, 0, count, shown ? shown : kept);
    if (shown && kept) {
        mpidl_copy(kept, shown, count * mpidl_itemsize(job->dtype), is_streamed(job));
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
