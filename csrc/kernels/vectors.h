/* Kernels for the floating types, by intrinsics: copy, scale, cast and sum of squares in one pass.
 *
 * Compiled once for each instruction set that has them. kernels_SET.c defines, on sixteen elements at a time, the types
 * floats, doubles and halves (float16 or bfloat16, as bits), then TYPE_load, _store, _stream, _times and _squares as
 * far as they are used below, and the casts, and includes this file. Integers are copied by plain loops, which suffice.
 */
#include "kernels/kernels.h"

#define widen_float32(bits) (bits)
#define narrow_float32(values) (*(values))
#define widen_float64(bits) (bits)
#define narrow_float64(values) (*(values))

MPIDL_INLINE void floats_write(char *out, floats values, bool streamed) {
    if (streamed) {
        floats_stream(out, values);
    } else {
        floats_store(out, values);
    }
}

MPIDL_INLINE void doubles_write(char *out, doubles values, bool streamed) {
    if (streamed) {
        doubles_stream(out, values);
    } else {
        doubles_store(out, values);
    }
}

/* Never streamed: measured, nothing is gained. */
MPIDL_INLINE void halves_write(char *out, halves bits, bool streamed) {
    (void)streamed;
    halves_store(out, bits);
}

/* Sixteen elements, MPIDL_LANES of them. `scaled` and `streamed` are constants wherever it is called. */
typedef void step(const char *source, char *out, double scale, bool scaled, bool streamed, doubles *sums);

/* Up to sixteen elements, through a copy padded with zeros: they add nothing to a sum of squares. */
MPIDL_INLINE void move_part(step *one, size_t source_item, size_t out_item, const char *source, char *out,
                            int64_t count, double scale, bool scaled, doubles *sums) {
    char padded[sizeof(doubles)] = {0}, written[sizeof(doubles)];
    memcpy(padded, source, (size_t)count * source_item);
    one(padded, written, scale, scaled, false, sums);
    memcpy(out, written, (size_t)count * out_item);
}

MPIDL_INLINE void move_run(step *one, size_t source_item, size_t out_item, const char *source, char *out, int64_t count,
                           double scale, bool scaled, bool streamed, double *lanes) {
    doubles sums = doubles_load((const char *)lanes);
    for (; count >= MPIDL_LANES; count -= MPIDL_LANES) {
        /* The processor's own prefetcher stops at the end of a page. What lies past the last element is not read. */
        __builtin_prefetch((const void *)((uintptr_t)source + 2048));
        one(source, out, scale, scaled, streamed, &sums);
        source += MPIDL_LANES * source_item;
        out += MPIDL_LANES * out_item;
    }
    if (count > 0) {
        move_part(one, source_item, out_item, source, out, count, scale, scaled, &sums);
    }
    doubles_store((char *)lanes, sums);
}

/* Partial sum i becomes partial sum i - by. */
static inline void turn(double *lanes, int64_t by) {
    double turned[MPIDL_LANES];
    for (int64_t i = 0; i < MPIDL_LANES; i++) {
        turned[i] = lanes[(i + by) % MPIDL_LANES];
    }
    memcpy(lanes, turned, sizeof turned);
}

/* Streaming stores take aligned places only. What comes before the first is moved apart, and the partial sums are
 * turned by as much, so that each meets the elements that it would meet otherwise.
 */
MPIDL_INLINE void move_streamed(step *one, size_t source_item, size_t out_item, const char *source, char *out,
                                int64_t count, double scale, bool scaled, double *lanes) {
    int64_t head = (int64_t)(-(uintptr_t)out % (MPIDL_LANES * out_item) / out_item);
    doubles sums = doubles_load((const char *)lanes);
    move_part(one, source_item, out_item, source, out, head, scale, scaled, &sums);
    doubles_store((char *)lanes, sums);
    turn(lanes, head);
    source += (size_t)head * source_item;
    out += (size_t)head * out_item;
    move_run(one, source_item, out_item, source, out, count - head, scale, scaled, true, lanes);
    stream_end();
    turn(lanes, MPIDL_LANES - head);
}

MPIDL_INLINE void move(step *one, size_t source_item, size_t out_item, const char *source, char *out, int64_t count,
                       double scale, bool streamed, double *lanes) {
    streamed = streamed && out_item >= sizeof(float) && (uintptr_t)out % out_item == 0 && count >= MPIDL_LANES;
    if (scale == 1.0 && streamed) {
        move_streamed(one, source_item, out_item, source, out, count, 1, false, lanes);
    } else if (scale == 1.0) {
        move_run(one, source_item, out_item, source, out, count, 1, false, false, lanes);
    } else if (streamed) {
        move_streamed(one, source_item, out_item, source, out, count, scale, true, lanes);
    } else {
        move_run(one, source_item, out_item, source, out, count, scale, true, false, lanes);
    }
}

/* What a kernel writes at scale 1. The processor makes no NaN quiet where nothing is computed. */
#define COPY(bits, values) (bits)
#define QUIET(bits, values) (quiet(values), *(values))
#define FLOAT32(bits, values) (*(values))
#define FLOAT16(bits, values) narrow_float16(values)
#define BFLOAT16(bits, values) narrow_bfloat16(values)

/* FROM, TO: how sixteen elements are held. IN, OUT: their dtypes. REAL: what the product is rounded to. UNSCALED: see
 * above. narrow_OUT(&values) leaves in `values` what its result stands for.
 */
#define DEFINE_KERNEL(NAME, FROM, IN, REAL, TO, OUT, UNSCALED)                                                       \
    static inline void NAME##_step(const char *source, char *out, double scale, bool scaled, bool streamed,          \
                                   doubles *sums) {                                                                  \
        FROM bits = FROM##_load(source);                                                                             \
        REAL values = widen_##IN(bits);                                                                              \
        TO written;                                                                                                  \
        if (scaled) {                                                                                                \
            values = REAL##_times(values, scale);                                                                    \
            written = narrow_##OUT(&values);                                                                         \
        } else {                                                                                                     \
            written = UNSCALED(bits, &values);                                                                       \
        }                                                                                                            \
        TO##_write(out, written, streamed);                                                                          \
        *sums = REAL##_squares(*sums, values);                                                                       \
    }                                                                                                                \
    static void NAME(const char *restrict source, char *restrict out, int64_t count, double scale, bool streamed,    \
                     double *restrict lanes) {                                                                       \
        move(NAME##_step, sizeof(FROM) / MPIDL_LANES, sizeof(TO) / MPIDL_LANES, source, out, count, scale, streamed, \
             lanes);                                                                                                 \
    }

DEFINE_KERNEL(float32_float32, floats, float32, floats, floats, float32, COPY)
DEFINE_KERNEL(float32_bfloat16, floats, float32, floats, halves, bfloat16, BFLOAT16)
DEFINE_KERNEL(float32_float16, floats, float32, floats, halves, float16, FLOAT16)
DEFINE_KERNEL(bfloat16_bfloat16, halves, bfloat16, floats, halves, bfloat16, COPY)
DEFINE_KERNEL(bfloat16_float32, halves, bfloat16, floats, floats, float32, QUIET)
DEFINE_KERNEL(float16_float16, halves, float16, floats, halves, float16, COPY)
DEFINE_KERNEL(float16_float32, halves, float16, floats, floats, float32, FLOAT32)
DEFINE_KERNEL(float64_float64, doubles, float64, doubles, doubles, float64, COPY)
