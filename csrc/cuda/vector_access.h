/* How a run of elements is cut into 16-byte words, read and written; and what it takes to be CUDA and C at once. */
#ifndef MPIDL_CUDA_WORDS_H
#define MPIDL_CUDA_WORDS_H

#include "include/mpidl.h"
#include "kernels/casts.h"

enum { MPIDL_WARP = 32, MPIDL_THREADS = 256, MPIDL_WARPS = MPIDL_THREADS / MPIDL_WARP, MPIDL_WORD = 16 };

#ifdef __CUDACC__
#define MPIDL_KERNEL static __global__ void __launch_bounds__(MPIDL_THREADS)
#define MPIDL_JOB const __grid_constant__ mpidl_cuda_job
#define MPIDL_SHARED __shared__
#define MPIDL_BLOCK ((int64_t)blockIdx.x)
#define MPIDL_BLOCKS ((int64_t)gridDim.x)
#define MPIDL_UNROLL _Pragma("unroll")
/* One step of a block: the barrier at its end orders it before the next. */
#define MPIDL_EACH(thread) for (int thread = (int)threadIdx.x, once = 1; once; once = 0, __syncthreads())
#define MPIDL_BODY static __device__ __forceinline__
#else
extern int64_t mpidl_host_block, mpidl_host_blocks; /* which block of how many is run */
#define MPIDL_KERNEL static void
#define MPIDL_JOB const mpidl_cuda_job
#define MPIDL_SHARED static
#define MPIDL_BLOCK mpidl_host_block
#define MPIDL_BLOCKS mpidl_host_blocks
#define MPIDL_UNROLL
#define MPIDL_EACH(thread) for (int thread = 0; thread < MPIDL_THREADS; thread++)
#define MPIDL_BODY MPIDL_INLINE
#endif

/* The 16 bytes that one access moves. */
typedef struct {
    uint64_t low, high;
} mpidl_word;

MPIDL_BODY mpidl_word load_word(uint64_t address) {
    mpidl_word word;
#ifdef __CUDACC__
    asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(word.low), "=l"(word.high) : "l"(address) : "memory");
#else
    memcpy(&word, (const void *)address, sizeof word);
#endif
    return word;
}

MPIDL_BODY void store_word(uint64_t address, mpidl_word word) {
#ifdef __CUDACC__
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" : : "l"(address), "l"(word.low), "l"(word.high) : "memory");
#else
    memcpy((void *)address, &word, sizeof word);
#endif
}

/* The 16 bytes that begin `shift` bytes, 1 to 15, after those of `first`. */
MPIDL_BODY mpidl_word spliced(mpidl_word first, mpidl_word second, int shift) {
    mpidl_word from = first;
    uint64_t beyond = second.low;
    if (shift >= 8) {
        from.low = first.high;
        from.high = second.low;
        beyond = second.high;
    }
    int bits = shift % 8 * 8;
    if (bits != 0) {
        from.low = from.low >> bits | from.high << (64 - bits);
        from.high = from.high >> bits | beyond << (64 - bits);
    }
    return from;
}

/* Element i of a row of words, and a row of words with element i put in: bit arithmetic, so that they stay in
 * registers. `i` is known when the loops around are unrolled.
 */
#define ELEMENT(TYPE, words, i)                                                                      \
    ((TYPE)(((i) * sizeof(TYPE) % MPIDL_WORD < 8 ? (words)[(i) * sizeof(TYPE) / MPIDL_WORD].low      \
                                                 : (words)[(i) * sizeof(TYPE) / MPIDL_WORD].high) >> \
            (i) * sizeof(TYPE) % 8 * 8))
#define PUT_ELEMENT(TYPE, words, i, value)                                 \
    do {                                                                   \
        uint64_t placed = (uint64_t)(value) << (i) * sizeof(TYPE) % 8 * 8; \
        if ((i) * sizeof(TYPE) % MPIDL_WORD < 8) {                         \
            (words)[(i) * sizeof(TYPE) / MPIDL_WORD].low |= placed;        \
        } else {                                                           \
            (words)[(i) * sizeof(TYPE) / MPIDL_WORD].high |= placed;       \
        }                                                                  \
    } while (0)

/* How a run of elements is cut: `head` single ones, `groups` of whole words, and single ones again. */
typedef struct {
    int64_t head, groups;
    int shift; /* bytes by which the source lies behind a border of words where the destination is at one */
} mpidl_plan;

/* Words are never read beyond the run, so nothing outside of the user's memory is touched. */
MPIDL_BODY mpidl_plan planned(uint64_t source, uint64_t out, int64_t count, int from_size, int to_size, int group) {
    mpidl_plan plan = {count, 0, 0};
    int ahead = (int)((MPIDL_WORD - out % MPIDL_WORD) % MPIDL_WORD);
    if (ahead % to_size != 0) {
        return plan; /* elements that lie across the borders of words */
    }
    int64_t head = ahead / to_size;
    int shift = (int)((source + (uint64_t)(head * from_size)) % MPIDL_WORD);
    if (head * from_size < shift) {
        head += group; /* the first word would begin before the run */
    }
    int64_t groups = head < count ? (count - head) / group : 0;
    if (shift != 0 && (head + groups * group) * from_size - shift + MPIDL_WORD > count * from_size) {
        groups--; /* the last word would end behind it */
    }
    if (groups > 0) {
        plan.head = head;
        plan.groups = groups;
        plan.shift = shift;
    }
    return plan;
}

/* The last segment that begins at or before this element: the one in which it lies, since empty ones come earlier. */
MPIDL_BODY int64_t segment_of(const int64_t *prefix, int64_t segments, int64_t element) {
    int64_t low = 0, high = segments;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (prefix[middle] <= element) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Aligned elements are one access; others, which only cupy can make, are one for each byte. */
#define DEFINE_ACCESS(TYPE)                                                                           \
    MPIDL_BODY TYPE load_##TYPE(uint64_t address) {                                                   \
        TYPE bits;                                                                                    \
        if (address % sizeof bits == 0) {                                                             \
            memcpy(&bits, __builtin_assume_aligned((const void *)address, sizeof bits), sizeof bits); \
        } else {                                                                                      \
            memcpy(&bits, (const void *)address, sizeof bits);                                        \
        }                                                                                             \
        return bits;                                                                                  \
    }                                                                                                 \
    MPIDL_BODY void store_##TYPE(uint64_t address, TYPE bits) {                                       \
        if (address % sizeof bits == 0) {                                                             \
            memcpy(__builtin_assume_aligned((void *)address, sizeof bits), &bits, sizeof bits);       \
        } else {                                                                                      \
            memcpy((void *)address, &bits, sizeof bits);                                              \
        }                                                                                             \
    }
DEFINE_ACCESS(uint8_t)
DEFINE_ACCESS(uint16_t)
DEFINE_ACCESS(uint32_t)
DEFINE_ACCESS(uint64_t)

#endif
