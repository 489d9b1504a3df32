/* Kernels as plain loops, one macro per pair of dtypes: copy, scale, cast and sum of squares in one pass. The
 * compiler's vectoriser takes them, for whatever instruction set the including file is compiled.
 */
#ifndef MPIDL_LOOPS_H
#define MPIDL_LOOPS_H

#include "kernels/casts.h"
#include "kernels/kernels.h"

/* BLOCK, of each kernel: that many elements are converted by one loop and squared by the next. FUSED: both loops are
 * unrolled and become one, the values stay in registers. SPLIT: two simple loops over the first cache, for casts that
 * the vectoriser of gcc 12 refuses otherwise.
 */
enum { FUSED = MPIDL_LANES, SPLIT = 512 };

/* FROM, TO: bits as they lie in memory. REAL: what the product is rounded to. UNSCALED(bits): the result at scale 1.
 * DECODE, ENCODE: casts.h.
 */
#define DEFINE_LOOP(NAME, BLOCK, FROM, TO, REAL, DECODE, ENCODE, DECODE_OUT, UNSCALED)                            \
    MPIDL_INLINE void NAME##_block(const char *restrict source, char *restrict out, int64_t count, REAL scale,    \
                                   bool scaled, double *restrict lanes) {                                         \
        REAL values[BLOCK];                                                                                       \
        for (int64_t i = 0; i < count; i++) {                                                                     \
            FROM bits;                                                                                            \
            memcpy(&bits, source + i * (int64_t)sizeof(FROM), sizeof(FROM));                                      \
            TO written = scaled ? ENCODE(DECODE(bits) * scale) : UNSCALED(bits);                                  \
            memcpy(out + i * (int64_t)sizeof(TO), &written, sizeof(TO));                                          \
            values[i] = DECODE_OUT(written);                                                                      \
        }                                                                                                         \
        int64_t i = 0;                                                                                            \
        for (; i + MPIDL_LANES <= count; i += MPIDL_LANES) {                                                      \
            for (int lane = 0; lane < MPIDL_LANES; lane++) {                                                      \
                lanes[lane] += (double)values[i + lane] * (double)values[i + lane];                               \
            }                                                                                                     \
        }                                                                                                         \
        for (int lane = 0; i < count; i++, lane++) {                                                              \
            lanes[lane] += (double)values[i] * (double)values[i];                                                 \
        }                                                                                                         \
    }                                                                                                             \
    MPIDL_INLINE void NAME##_run(const char *restrict source, char *restrict out, int64_t count, REAL scale,      \
                                 bool scaled, double *restrict lanes) {                                           \
        for (; count >= BLOCK; count -= BLOCK) {                                                                  \
            NAME##_block(source, out, BLOCK, scale, scaled, lanes);                                               \
            source += BLOCK * sizeof(FROM);                                                                       \
            out += BLOCK * sizeof(TO);                                                                            \
        }                                                                                                         \
        NAME##_block(source, out, count, scale, scaled, lanes);                                                   \
    }                                                                                                             \
    static void NAME(const char *restrict source, char *restrict out, int64_t count, double scale, bool streamed, \
                     double *restrict lanes) {                                                                    \
        (void)streamed;                                                                                           \
        double local[MPIDL_LANES];                                                                                \
        memcpy(local, lanes, sizeof local);                                                                       \
        if (scale == 1.0) {                                                                                       \
            NAME##_run(source, out, count, (REAL)1, false, local);                                                \
        } else {                                                                                                  \
            NAME##_run(source, out, count, (REAL)scale, true, local);                                             \
        }                                                                                                         \
        memcpy(lanes, local, sizeof local);                                                                       \
    }

#define AS_IT_IS(value) (value)
#define DEFINE_INTEGER(NAME, BLOCK, TYPE) \
    DEFINE_LOOP(NAME, BLOCK, TYPE, TYPE, TYPE, AS_IT_IS, (TYPE), AS_IT_IS, AS_IT_IS)

DEFINE_INTEGER(int8_int8, SPLIT, int8_t)
DEFINE_INTEGER(int16_int16, SPLIT, int16_t)
DEFINE_INTEGER(int32_int32, FUSED, int32_t)
DEFINE_INTEGER(int64_int64, FUSED, int64_t)
DEFINE_INTEGER(uint8_uint8, SPLIT, uint8_t)
DEFINE_INTEGER(uint16_uint16, SPLIT, uint16_t)
DEFINE_INTEGER(uint32_uint32, FUSED, uint32_t)
DEFINE_INTEGER(uint64_uint64, FUSED, uint64_t)

/* Of the including file: its kernels for floating types, under the names that the portable ones have. */
#define MPIDL_TABLE                                        \
    {[MPIDL_FLOAT32][MPIDL_FLOAT32] = float32_float32,     \
     [MPIDL_FLOAT32][MPIDL_BFLOAT16] = float32_bfloat16,   \
     [MPIDL_FLOAT32][MPIDL_FLOAT16] = float32_float16,     \
     [MPIDL_BFLOAT16][MPIDL_BFLOAT16] = bfloat16_bfloat16, \
     [MPIDL_BFLOAT16][MPIDL_FLOAT32] = bfloat16_float32,   \
     [MPIDL_FLOAT16][MPIDL_FLOAT16] = float16_float16,     \
     [MPIDL_FLOAT16][MPIDL_FLOAT32] = float16_float32,     \
     [MPIDL_FLOAT64][MPIDL_FLOAT64] = float64_float64,     \
     [MPIDL_INT8][MPIDL_INT8] = int8_int8,                 \
     [MPIDL_INT16][MPIDL_INT16] = int16_int16,             \
     [MPIDL_INT32][MPIDL_INT32] = int32_int32,             \
     [MPIDL_INT64][MPIDL_INT64] = int64_int64,             \
     [MPIDL_UINT8][MPIDL_UINT8] = uint8_uint8,             \
     [MPIDL_UINT16][MPIDL_UINT16] = uint16_uint16,         \
     [MPIDL_UINT32][MPIDL_UINT32] = uint32_uint32,         \
     [MPIDL_UINT64][MPIDL_UINT64] = uint64_uint64}

#endif
