/* One loop per pair of dtypes: copy, scale, cast and sum of squares in one pass. Which segment comes when, and every
 * check of arguments, is packing.c's.
 */
#include "kernels.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>

#include "casts.h"

/* The loader picks the clone that the processor can run. That takes ifunc, hence glibc. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(MPIDL_ONE_CLONE)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CLONES
#endif

/* LANES: independent partial sums: additions do not wait for each other, the vectoriser needs no licence to reorder
 * them, and since their number is fixed all clones give the same bits.
 * BLOCK, of each kernel: that many elements are converted by one loop and squared by the next. FUSED: both loops are
 * unrolled and become one, the values stay in registers. SPLIT: two simple loops over the first cache, for casts that
 * the vectoriser of gcc 12 refuses otherwise.
 *
 * A first look says that with the clones memory bounds all casts but those to and from float16, where F16C's
 * instructions are still to gain; a benchmark that can be quoted is still to be written.
 */
enum { LANES = 16, FUSED = LANES, SPLIT = 512 };

static double total(const double *lanes) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

/* Squares of float64 can overflow where no value is infinite: only then is a run looked at again. */
static bool all_finite_float64(const char *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits;
        memcpy(&bits, out + i * (int64_t)sizeof bits, sizeof bits);
        if (!isfinite(decode_float64(bits))) {
            return false;
        }
    }
    return true;
}

/* Squares of anything narrower are finite in a double, and so is the sum of 2^63 of them. */
static bool never(const char *out, int64_t count) {
    (void)out;
    (void)count;
    return false;
}

/* FROM, TO: bits as they lie in memory. REAL: what the product is rounded to. UNSCALED(bits): the result at scale 1.
 * DECODE, ENCODE: casts.h. RESCUE: whether a run whose sum of squares is not finite is finite all the same.
 */
#define DEFINE_KERNEL(NAME, BLOCK, FROM, TO, REAL, DECODE, ENCODE, DECODE_OUT, UNSCALED, RESCUE)               \
    MPIDL_INLINE void NAME##_block(const char *restrict source, char *restrict out, int64_t count, REAL scale, \
                                   bool scaled, double *restrict lanes) {                                      \
        REAL values[BLOCK];                                                                                    \
        for (int64_t i = 0; i < count; i++) {                                                                  \
            FROM bits;                                                                                         \
            memcpy(&bits, source + i * (int64_t)sizeof(FROM), sizeof(FROM));                                   \
            TO written = scaled ? ENCODE(DECODE(bits) * scale) : UNSCALED(bits);                               \
            memcpy(out + i * (int64_t)sizeof(TO), &written, sizeof(TO));                                       \
            values[i] = DECODE_OUT(written);                                                                   \
        }                                                                                                      \
        int64_t i = 0;                                                                                         \
        for (; i + LANES <= count; i += LANES) {                                                               \
            for (int lane = 0; lane < LANES; lane++) {                                                         \
                lanes[lane] += (double)values[i + lane] * (double)values[i + lane];                            \
            }                                                                                                  \
        }                                                                                                      \
        for (int lane = 0; i < count; i++, lane++) {                                                           \
            lanes[lane] += (double)values[i] * (double)values[i];                                              \
        }                                                                                                      \
    }                                                                                                          \
    MPIDL_INLINE void NAME##_run(const char *restrict source, char *restrict out, int64_t count, REAL scale,   \
                                 bool scaled, double *restrict lanes) {                                        \
        for (; count >= BLOCK; count -= BLOCK) {                                                               \
            NAME##_block(source, out, BLOCK, scale, scaled, lanes);                                            \
            source += BLOCK * sizeof(FROM);                                                                    \
            out += BLOCK * sizeof(TO);                                                                         \
        }                                                                                                      \
        NAME##_block(source, out, count, scale, scaled, lanes);                                                \
    }                                                                                                          \
    CLONES static void NAME(const char *restrict source, char *restrict out, int64_t count, double scale,      \
                            mpidl_packed *packed) {                                                            \
        double lanes[LANES] = {0};                                                                             \
        if (scale == 1.0) {                                                                                    \
            NAME##_run(source, out, count, (REAL)1, false, lanes);                                             \
        } else {                                                                                               \
            NAME##_run(source, out, count, (REAL)scale, true, lanes);                                          \
        }                                                                                                      \
        double sum = total(lanes);                                                                             \
        packed->count += count;                                                                                \
        packed->sum_of_squares += sum;                                                                         \
        if (!isfinite(sum) && !RESCUE(out, count)) {                                                           \
            packed->finite = 0;                                                                                \
        }                                                                                                      \
    }

#define AS_IT_IS(value) (value)
#define FLOAT32_TO_BFLOAT16(bits) encode_bfloat16(decode_float32(bits))
#define FLOAT32_TO_FLOAT16(bits) encode_float16(decode_float32(bits))
#define BFLOAT16_TO_FLOAT32(bits) encode_float32(decode_bfloat16(bits))
#define FLOAT16_TO_FLOAT32(bits) encode_float32(decode_float16(bits))

#define DEFINE_FLOAT(NAME, BLOCK, FROM, TO, IN, OUT, UNSCALED) \
    DEFINE_KERNEL(NAME, BLOCK, FROM, TO, float, decode_##IN, encode_##OUT, decode_##OUT, UNSCALED, never)
#define DEFINE_INTEGER(NAME, BLOCK, TYPE) \
    DEFINE_KERNEL(NAME, BLOCK, TYPE, TYPE, TYPE, AS_IT_IS, (TYPE), AS_IT_IS, AS_IT_IS, never)

DEFINE_FLOAT(float32_float32, FUSED, uint32_t, uint32_t, float32, float32, AS_IT_IS)
DEFINE_FLOAT(float32_bfloat16, SPLIT, uint32_t, uint16_t, float32, bfloat16, FLOAT32_TO_BFLOAT16)
DEFINE_FLOAT(float32_float16, SPLIT, uint32_t, uint16_t, float32, float16, FLOAT32_TO_FLOAT16)
DEFINE_FLOAT(bfloat16_bfloat16, SPLIT, uint16_t, uint16_t, bfloat16, bfloat16, AS_IT_IS)
DEFINE_FLOAT(bfloat16_float32, SPLIT, uint16_t, uint32_t, bfloat16, float32, BFLOAT16_TO_FLOAT32)
DEFINE_FLOAT(float16_float16, SPLIT, uint16_t, uint16_t, float16, float16, AS_IT_IS)
DEFINE_FLOAT(float16_float32, SPLIT, uint16_t, uint32_t, float16, float32, FLOAT16_TO_FLOAT32)
DEFINE_KERNEL(float64_float64, FUSED, uint64_t, uint64_t, double, decode_float64, encode_float64, decode_float64,
              AS_IT_IS, all_finite_float64)
DEFINE_INTEGER(int8_int8, SPLIT, int8_t)
DEFINE_INTEGER(int16_int16, SPLIT, int16_t)
DEFINE_INTEGER(int32_int32, FUSED, int32_t)
DEFINE_INTEGER(int64_int64, FUSED, int64_t)
DEFINE_INTEGER(uint8_uint8, SPLIT, uint8_t)
DEFINE_INTEGER(uint16_uint16, SPLIT, uint16_t)
DEFINE_INTEGER(uint32_uint32, FUSED, uint32_t)
DEFINE_INTEGER(uint64_uint64, FUSED, uint64_t)

mpidl_kernel *mpidl_find_kernel(int source_dtype, int out_dtype) {
    static mpidl_kernel *const table[MPIDL_DTYPES][MPIDL_DTYPES] = {
        [MPIDL_FLOAT32][MPIDL_FLOAT32] = float32_float32,
        [MPIDL_FLOAT32][MPIDL_BFLOAT16] = float32_bfloat16,
        [MPIDL_FLOAT32][MPIDL_FLOAT16] = float32_float16,
        [MPIDL_BFLOAT16][MPIDL_BFLOAT16] = bfloat16_bfloat16,
        [MPIDL_BFLOAT16][MPIDL_FLOAT32] = bfloat16_float32,
        [MPIDL_FLOAT16][MPIDL_FLOAT16] = float16_float16,
        [MPIDL_FLOAT16][MPIDL_FLOAT32] = float16_float32,
        [MPIDL_FLOAT64][MPIDL_FLOAT64] = float64_float64,
        [MPIDL_INT8][MPIDL_INT8] = int8_int8,
        [MPIDL_INT16][MPIDL_INT16] = int16_int16,
        [MPIDL_INT32][MPIDL_INT32] = int32_int32,
        [MPIDL_INT64][MPIDL_INT64] = int64_int64,
        [MPIDL_UINT8][MPIDL_UINT8] = uint8_uint8,
        [MPIDL_UINT16][MPIDL_UINT16] = uint16_uint16,
        [MPIDL_UINT32][MPIDL_UINT32] = uint32_uint32,
        [MPIDL_UINT64][MPIDL_UINT64] = uint64_uint64,
    };
    if (source_dtype < 0 || source_dtype >= MPIDL_DTYPES || out_dtype < 0 || out_dtype >= MPIDL_DTYPES) {
        return NULL;
    }
    return table[source_dtype][out_dtype];
}

int64_t mpidl_itemsize(int dtype) {
    static const int8_t sizes[MPIDL_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    return sizes[dtype];
}

bool mpidl_is_integer(int dtype) {
    return dtype >= MPIDL_INT8;
}
