/* The interface of mpidl's extension: packing many tensors into one flat buffer and back.
 *
 * A plain shared library: no MPI, torch or Python header stands here or in any source beside it, so one build serves
 * every MPI, torch and Python. Counts and offsets are elements, in 64 bits. No function allocates, blocks or aborts;
 * each returns a status. mpidl/native/library.py takes the declarations from here and is the only caller.
 */
#ifndef MPIDL_H
#define MPIDL_H

#include <stdint.h>

#define MPIDL_API __attribute__((visibility("default")))

/* Raised whenever a declaration below changes; library.py refuses a library that answers another number. */
#define MPIDL_INTERFACE 8

enum mpidl_dtype {
    MPIDL_FLOAT32,
    MPIDL_FLOAT64,
    MPIDL_FLOAT16,
    MPIDL_BFLOAT16,
    MPIDL_INT8,
    MPIDL_INT16,
    MPIDL_INT32,
    MPIDL_INT64,
    MPIDL_UINT8,
    MPIDL_UINT16,
    MPIDL_UINT32,
    MPIDL_UINT64,
    MPIDL_DTYPES
};

enum mpidl_status {
    MPIDL_OK,
    MPIDL_BAD_DTYPE,       /* no kernel converts the one dtype into the other */
    MPIDL_BAD_SCALE,       /* integers take exactly 1, others what their arithmetic can hold */
    MPIDL_BAD_COUNT,       /* a count or offset is negative or its bytes do not fit in 64 bits */
    MPIDL_BAD_ADDRESS,     /* null, where there are elements to read or write */
    MPIDL_BAD_INSTRUCTIONS /* this build does not have them, or this processor does not run them */
};

/* What the kernels are compiled for. All give the same bits. */
enum mpidl_instructions {
    MPIDL_PORTABLE,
    MPIDL_AVX2,   /* with FMA and F16C */
    MPIDL_AVX512, /* F, BW, DQ and VL */
    MPIDL_INSTRUCTION_SETS
};

/* What one call has written, in elements of the destination's dtype. */
typedef struct {
    int64_t count;
    double sum_of_squares; /* of the values as written: after scale and cast */
    int32_t finite;        /* 1 if none of them is infinite or NaN */
} mpidl_packed;

/* Segment s of a table is counts[s] elements at addresses[s], and the same number at offset offsets[s] of the flat
 * buffer. Addresses may have any alignment. Sources and destinations must not overlap.
 *
 * Every element becomes cast(element * scale): the product in float64 for float64 and in float32 otherwise, the cast
 * to nearest, ties to even. With equal dtypes and a scale of exactly 1 the bytes are copied unchanged.
 * Nothing is written unless the status is MPIDL_OK.
 */
MPIDL_API int mpidl_gather(int64_t segments, const uintptr_t *addresses, const int64_t *counts, const int64_t *offsets,
                           int source_dtype, uintptr_t flat, int flat_dtype, double scale, mpidl_packed *packed);
MPIDL_API int mpidl_scatter(int64_t segments, const uintptr_t *addresses, const int64_t *counts, const int64_t *offsets,
                            int target_dtype, uintptr_t flat, int flat_dtype, double scale, mpidl_packed *packed);

/* Whether an instruction set can be used; takes it for all calls from now on, by whatever thread; which one that is:
 * the best that can be used, unless mpidl_use() took another.
 */
MPIDL_API int mpidl_supports(int instructions);
MPIDL_API int mpidl_use(int instructions);
MPIDL_API int mpidl_instructions(void);

MPIDL_API int mpidl_interface(void);

#endif
