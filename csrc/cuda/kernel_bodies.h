/* The kernels of packing on a device: one per pair of dtypes, for both directions.
 *
 * nvcc makes kernels of them. A C compiler makes functions of them that run one block after the other: a step of a
 * block, between two barriers, is a loop over its threads there. tests/cuda_host runs those against the reference.
 *
 * Work is cut by elements, hence by bytes, and not by segment: every warp has an equal share of the elements of all
 * segments, one behind the other, and finds its first segment by bisection of their prefix sums. Sums are added in an
 * order that the table and the device fix, so the same call gives the same bits.
 */
#ifndef MPIDL_CUDA_BODIES_H
#define MPIDL_CUDA_BODIES_H

#include "cuda/vector_access.h"

typedef struct {
    double sum;      /* of squares */
    int64_t strange; /* values that are infinite or NaN */
} mpidl_tally;

/* What one launch is given; all addresses are the device's. */
typedef struct {
    int64_t segments;
    const int64_t *prefix;  /* prefix[s] elements lie before segment s; segments + 1 entries */
    const int64_t *offsets; /* of segment s in the flat buffer */
    const uint64_t *addresses;
    uint64_t flat;
    int64_t share; /* elements of each warp */
    double scale;
    int32_t to_flat;
    uint32_t *ticket;     /* 0; and 0 again at the end */
    mpidl_tally *tallies; /* one per block */
    mpidl_packed *packed; /* pinned memory of the host */
} mpidl_cuda_job;

MPIDL_BODY void count_value(mpidl_tally *tally, double value) {
    tally->sum += value * value;
    tally->strange += (encode_float64(value) >> 52 & 0x7ff) == 0x7ff;
}

MPIDL_BODY void fold(mpidl_tally *tallies, int thread, int half) {
    if (thread < half) {
        tallies[thread].sum += tallies[thread + half].sum;
        tallies[thread].strange += tallies[thread + half].strange;
    }
}

/* Hands in the block's tally; returns whether it was the last block to do so. */
MPIDL_BODY int hand_in(const mpidl_cuda_job *job, mpidl_tally tally) {
    job->tallies[MPIDL_BLOCK] = tally;
#ifdef __CUDACC__
    __threadfence(); /* whoever sees the count below sees the tally */
    return atomicAdd(job->ticket, 1u) == (uint32_t)MPIDL_BLOCKS - 1;
#else
    return (*job->ticket)++ == (uint32_t)MPIDL_BLOCKS - 1;
#endif
}

/* The sum over some of the blocks, in their order, once all have handed in. */
MPIDL_BODY mpidl_tally collected(const mpidl_cuda_job *job, int thread) {
    mpidl_tally tally = {0, 0};
#ifdef __CUDACC__
    __threadfence(); /* not read before the count */
#endif
    const volatile mpidl_tally *tallies = job->tallies;
    for (int64_t block = thread; block < MPIDL_BLOCKS; block += MPIDL_THREADS) {
        tally.sum += tallies[block].sum;
        tally.strange += tallies[block].strange;
    }
    return tally;
}

/* What the launch has written, told to the host by its last thread. */
MPIDL_BODY void tell(const mpidl_cuda_job *job, mpidl_tally tally) {
    *job->ticket = 0;
    job->packed->count = job->prefix[job->segments];
    job->packed->sum_of_squares = tally.sum;
    job->packed->finite = tally.strange == 0;
}

/* From one tally a thread to one of the launch: over the block in a tree, then, in the block that comes last, over the
 * blocks likewise.
 */
MPIDL_BODY void sum_up(const mpidl_cuda_job *job, mpidl_tally *tallies, int *last) {
    for (int half = MPIDL_THREADS / 2; half > 0; half /= 2) {
        MPIDL_EACH(thread) {
            fold(tallies, thread, half);
        }
    }
    MPIDL_EACH(thread) {
        if (thread == 0) {
            *last = hand_in(job, tallies[0]);
        }
    }
    if (!*last) {
        return;
    }
    MPIDL_EACH(thread) {
        tallies[thread] = collected(job, thread);
    }
    for (int half = MPIDL_THREADS / 2; half > 0; half /= 2) {
        MPIDL_EACH(thread) {
            fold(tallies, thread, half);
        }
    }
    MPIDL_EACH(thread) {
        if (thread == 0) {
            tell(job, tallies[0]);
        }
    }
}

/* FROM, TO: bits as they lie in memory. REAL: what the product is rounded to. SCALED(bits, scale), UNSCALED(bits): the
 * result. VALUE(written): it as a double.
 */
#define DEFINE_CUDA_KERNEL(NAME, FROM, TO, REAL, SCALED, UNSCALED, VALUE)                                          \
    MPIDL_BODY TO NAME##_converted(FROM bits, REAL scale, int scaled, mpidl_tally *tally) {                        \
        TO written = scaled ? SCALED(bits, scale) : UNSCALED(bits);                                                \
        count_value(tally, VALUE(written));                                                                        \
        return written;                                                                                            \
    }                                                                                                              \
    MPIDL_BODY void NAME##_single(uint64_t source, uint64_t out, int64_t i, REAL scale, int scaled,                \
                                  mpidl_tally *tally) {                                                            \
        FROM bits = load_##FROM(source + (uint64_t)i * sizeof(FROM));                                              \
        store_##TO(out + (uint64_t)i * sizeof(TO), NAME##_converted(bits, scale, scaled, tally));                  \
    }                                                                                                              \
    MPIDL_BODY void NAME##_run(uint64_t source, uint64_t out, int64_t count, REAL scale, int scaled, int lane,     \
                               mpidl_tally *tally) {                                                               \
        enum {                                                                                                     \
            GROUP = MPIDL_WORD / (sizeof(FROM) < sizeof(TO) ? sizeof(FROM) : sizeof(TO)),                          \
            LOADS = GROUP * sizeof(FROM) / MPIDL_WORD,                                                             \
            STORES = GROUP * sizeof(TO) / MPIDL_WORD                                                               \
        };                                                                                                         \
        mpidl_plan plan = planned(source, out, count, sizeof(FROM), sizeof(TO), GROUP);                            \
        for (int64_t i = lane; i < plan.head; i += MPIDL_WARP) {                                                   \
            NAME##_single(source, out, i, scale, scaled, tally);                                                   \
        }                                                                                                          \
        for (int64_t g = lane; g < plan.groups; g += MPIDL_WARP) {                                                 \
            int64_t first = plan.head + g * GROUP;                                                                 \
            uint64_t at = source + (uint64_t)first * sizeof(FROM) - (uint64_t)plan.shift;                          \
            mpidl_word read[LOADS + 1], written[STORES] = {{0, 0}};                                                \
            MPIDL_UNROLL for (int k = 0; k < LOADS; k++) {                                                         \
                read[k] = load_word(at + (uint64_t)k * MPIDL_WORD);                                                \
            }                                                                                                      \
            if (plan.shift != 0) {                                                                                 \
                read[LOADS] = load_word(at + LOADS * MPIDL_WORD);                                                  \
                MPIDL_UNROLL for (int k = 0; k < LOADS; k++) {                                                     \
                    read[k] = spliced(read[k], read[k + 1], plan.shift);                                           \
                }                                                                                                  \
            }                                                                                                      \
            MPIDL_UNROLL for (int i = 0; i < GROUP; i++) {                                                         \
                TO bits = NAME##_converted(ELEMENT(FROM, read, i), scale, scaled, tally);                          \
                PUT_ELEMENT(TO, written, i, bits);                                                                 \
            }                                                                                                      \
            MPIDL_UNROLL for (int k = 0; k < STORES; k++) {                                                        \
                store_word(out + (uint64_t)first * sizeof(TO) + (uint64_t)k * MPIDL_WORD, written[k]);             \
            }                                                                                                      \
        }                                                                                                          \
        for (int64_t i = plan.head + plan.groups * GROUP + lane; i < count; i += MPIDL_WARP) {                     \
            NAME##_single(source, out, i, scale, scaled, tally);                                                   \
        }                                                                                                          \
    }                                                                                                              \
    /* The share of one warp, as one of its lanes works on it. */                                                  \
    MPIDL_BODY mpidl_tally NAME##_share(const mpidl_cuda_job *job, int64_t warp, int lane) {                       \
        mpidl_tally tally = {0, 0};                                                                                \
        int64_t total = job->prefix[job->segments], element = warp * job->share;                                   \
        int64_t end = total - element > job->share ? element + job->share : total;                                 \
        int64_t s = element < end ? segment_of(job->prefix, job->segments, element) : 0;                           \
        for (; element < end; s++) {                                                                               \
            int64_t inside = element - job->prefix[s];                                                             \
            int64_t stop = job->prefix[s + 1] < end ? job->prefix[s + 1] : end;                                    \
            uint64_t in_flat = (uint64_t)(job->offsets[s] + inside), in_segment = (uint64_t)inside;                \
            uint64_t source =                                                                                      \
                job->to_flat ? job->addresses[s] + in_segment * sizeof(FROM) : job->flat + in_flat * sizeof(FROM); \
            uint64_t out =                                                                                         \
                job->to_flat ? job->flat + in_flat * sizeof(TO) : job->addresses[s] + in_segment * sizeof(TO);     \
            if (job->scale == 1.0) {                                                                               \
                NAME##_run(source, out, stop - element, (REAL)1, 0, lane, &tally);                                 \
            } else {                                                                                               \
                NAME##_run(source, out, stop - element, (REAL)job->scale, 1, lane, &tally);                        \
            }                                                                                                      \
            element = stop;                                                                                        \
        }                                                                                                          \
        return tally;                                                                                              \
    }                                                                                                              \
    MPIDL_KERNEL NAME##_cuda(MPIDL_JOB job) {                                                                      \
        MPIDL_SHARED mpidl_tally tallies[MPIDL_THREADS];                                                           \
        MPIDL_SHARED int last;                                                                                     \
        MPIDL_EACH(thread) {                                                                                       \
            int64_t warp = MPIDL_BLOCK * MPIDL_WARPS + thread / MPIDL_WARP;                                        \
            tallies[thread] = NAME##_share(&job, warp, thread % MPIDL_WARP);                                       \
        }                                                                                                          \
        sum_up(&job, tallies, &last);                                                                              \
    }

#endif
