/* Reductions of one run of elements over several ranks, in rank order, as plain loops that the compiler's vectoriser
 * takes, for whatever instruction set the including file is compiled. Half types are combined in float32 and rounded
 * once.
 */
#ifndef MPIDL_REDUCTIONS_H
#define MPIDL_REDUCTIONS_H

#include "kernels/casts.h"
#include "kernels/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#define MPIDL_INDEPENDENT _Pragma("GCC ivdep") /* a turn of the loop writes at most where it has read */
#else
#define MPIDL_INDEPENDENT
#endif

/* Elements of partial results: they stay in the first cache while rank after rank is added. */
enum { REDUCED_AT_ONCE = 512 };

/* What all operations of a dtype share. BITS: elements as they lie in memory. REAL: in which they are combined. */
#define DEFINE_ENDS(NAME, BITS, REAL, DECODE, ENCODE)                                              \
    MPIDL_INLINE REAL NAME##_read(const char *source, int64_t i) {                                 \
        BITS bits;                                                                                 \
        memcpy(&bits, source + i * (int64_t)sizeof bits, sizeof bits);                             \
        return DECODE(bits);                                                                       \
    }                                                                                              \
    MPIDL_INLINE void NAME##_write(char *out, int64_t i, REAL value) {                             \
        BITS bits = ENCODE(value);                                                                 \
        memcpy(out + i * (int64_t)sizeof bits, &bits, sizeof bits);                                \
    }                                                                                              \
    static void NAME##_begin(REAL *restrict results, const char *restrict source, int64_t count) { \
        for (int64_t i = 0; i < count; i++) {                                                      \
            results[i] = NAME##_read(source, i);                                                   \
        }                                                                                          \
    }                                                                                              \
    static void NAME##_end(const REAL *restrict results, char *restrict out, int64_t count) {      \
        for (int64_t i = 0; i < count; i++) {                                                      \
            NAME##_write(out, i, results[i]);                                                      \
        }                                                                                          \
    }

#define DEFINE_DIVISION(REAL)                                                          \
    static void REAL##_divide(REAL *restrict results, int64_t count, double divisor) { \
        for (int64_t i = 0; divisor != 1.0 && i < count; i++) {                        \
            results[i] /= (REAL)divisor;                                               \
        }                                                                              \
    }
#define DEFINE_NO_DIVISION(REAL)                                               \
    static void REAL##_divide(REAL *results, int64_t count, double divisor) {  \
        (void)results, (void)count, (void)divisor; /* integers have no mean */ \
    }

/* The first source begins the result: combining it with a neutral element is not the same for -0. */
#define DEFINE_REDUCTION(NAME, TYPE, REAL, COMBINE)                                                              \
    static void TYPE##_##NAME(const char *const *sources, int ranks, char *out, int64_t count, double divisor) { \
        const int64_t item = mpidl_itemsize_of_##TYPE;                                                           \
        REAL results[REDUCED_AT_ONCE];                                                                           \
        for (int64_t at = 0; at < count; at += REDUCED_AT_ONCE) {                                                \
            const int64_t run = count - at < REDUCED_AT_ONCE ? count - at : REDUCED_AT_ONCE;                     \
            TYPE##_begin(results, sources[0] + at * item, run);                                                  \
            for (int rank = 1; rank < ranks; rank++) {                                                           \
                const char *source = sources[rank] + at * item;                                                  \
                for (int64_t i = 0; i < run; i++) {                                                              \
                    results[i] = COMBINE(results[i], TYPE##_read(source, i));                                    \
                }                                                                                                \
            }                                                                                                    \
            REAL##_divide(results, run, divisor);                                                                \
            TYPE##_end(results, out + at * item, run);                                                           \
        }                                                                                                        \
    }

#define PLUS(a, b) ((a) + (b))
#define TIMES(a, b) ((a) * (b))
#define LESSER(a, b) ((a) < (b) ? (a) : (b))
#define GREATER(a, b) ((a) > (b) ? (a) : (b))
/* A NaN wins against every number, as in numpy: `a` is one if it differs from itself, and `b` loses no comparison. */
#define LESSER_OR_NAN(a, b) (((a) < (b)) | ((a) != (a)) ? (a) : (b))
#define GREATER_OR_NAN(a, b) (((a) > (b)) | ((a) != (a)) ? (a) : (b))
#define DEFINE_REDUCTIONS(TYPE, REAL)                    \
    DEFINE_REDUCTION(sum, TYPE, REAL, PLUS)              \
    DEFINE_REDUCTION(product, TYPE, REAL, TIMES)         \
    DEFINE_REDUCTION(minimum, TYPE, REAL, LESSER_OR_NAN) \
    DEFINE_REDUCTION(maximum, TYPE, REAL, GREATER_OR_NAN)

enum {
    mpidl_itemsize_of_float32 = 4,
    mpidl_itemsize_of_float64 = 8,
    mpidl_itemsize_of_float16 = 2,
    mpidl_itemsize_of_bfloat16 = 2,
    mpidl_itemsize_of_int32 = 4,
    mpidl_itemsize_of_int64 = 8,
    mpidl_itemsize_of_wrapping32 = 4,
    mpidl_itemsize_of_wrapping64 = 8
};

#define ITSELF(value) (value)
DEFINE_ENDS(float32, uint32_t, float, decode_float32, encode_float32)
DEFINE_ENDS(float64, uint64_t, double, decode_float64, encode_float64)
DEFINE_ENDS(float16, uint16_t, float, decode_float16, encode_float16)
DEFINE_ENDS(bfloat16, uint16_t, float, decode_bfloat16, encode_bfloat16)
DEFINE_ENDS(int32, int32_t, int32_t, ITSELF, ITSELF)
DEFINE_ENDS(int64, int64_t, int64_t, ITSELF, ITSELF)
/* Sums and products of integers wrap around, as those of unsigned ones do by definition. */
DEFINE_ENDS(wrapping32, uint32_t, uint32_t, ITSELF, ITSELF)
DEFINE_ENDS(wrapping64, uint64_t, uint64_t, ITSELF, ITSELF)
DEFINE_DIVISION(float)
DEFINE_DIVISION(double)
DEFINE_NO_DIVISION(int32_t)
DEFINE_NO_DIVISION(int64_t)
DEFINE_NO_DIVISION(uint32_t)
DEFINE_NO_DIVISION(uint64_t)

DEFINE_REDUCTIONS(float64, double)
DEFINE_REDUCTIONS(float16, float)
DEFINE_REDUCTIONS(bfloat16, float)
DEFINE_REDUCTION(product, float32, float, TIMES)
DEFINE_REDUCTION(minimum, float32, float, LESSER_OR_NAN)
DEFINE_REDUCTION(maximum, float32, float, GREATER_OR_NAN)
DEFINE_REDUCTION(minimum, int32, int32_t, LESSER)
DEFINE_REDUCTION(maximum, int32, int32_t, GREATER)
DEFINE_REDUCTION(minimum, int64, int64_t, LESSER)
DEFINE_REDUCTION(maximum, int64, int64_t, GREATER)
DEFINE_REDUCTION(sum, wrapping32, uint32_t, PLUS)
DEFINE_REDUCTION(product, wrapping32, uint32_t, TIMES)
DEFINE_REDUCTION(sum, wrapping64, uint64_t, PLUS)
DEFINE_REDUCTION(product, wrapping64, uint64_t, TIMES)

/* What gradients need: two ranks in one loop, without the detour through partial results. */
DEFINE_REDUCTION(sum_of_many, float32, float, PLUS)
MPIDL_INLINE void float32_sum_of_two(const char *first, const char *second, char *out, int64_t count, float divisor) {
    MPIDL_INDEPENDENT
    for (int64_t i = 0; i < count; i++) {
        float sum = float32_read(first, i) + float32_read(second, i);
        float32_write(out, i, divisor == 1 ? sum : sum / divisor);
    }
}

static void float32_sum(const char *const *sources, int ranks, char *out, int64_t count, double divisor) {
    if (ranks != 2) {
        float32_sum_of_many(sources, ranks, out, count, divisor);
    } else if (divisor == 1) {
        float32_sum_of_two(sources[0], sources[1], out, count, 1);
    } else {
        float32_sum_of_two(sources[0], sources[1], out, count, (float)divisor);
    }
}

#define MPIDL_REDUCTIONS_OF(TYPE, WRAPPING) {WRAPPING##_sum, WRAPPING##_product, TYPE##_minimum, TYPE##_maximum}
#define MPIDL_REDUCTION_TABLE                                    \
    {[MPIDL_FLOAT32] = MPIDL_REDUCTIONS_OF(float32, float32),    \
     [MPIDL_FLOAT64] = MPIDL_REDUCTIONS_OF(float64, float64),    \
     [MPIDL_FLOAT16] = MPIDL_REDUCTIONS_OF(float16, float16),    \
     [MPIDL_BFLOAT16] = MPIDL_REDUCTIONS_OF(bfloat16, bfloat16), \
     [MPIDL_INT32] = MPIDL_REDUCTIONS_OF(int32, wrapping32),     \
     [MPIDL_INT64] = MPIDL_REDUCTIONS_OF(int64, wrapping64)}

#endif
