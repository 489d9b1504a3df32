/* The dispatch table: which kernel converts elements of one dtype into another on a device. */
#ifndef MPIDL_CUDA_PAIRS_H
#define MPIDL_CUDA_PAIRS_H

#include "cuda/kernel_bodies.h"

#define UNCHANGED(bits) (bits)
#define UNSCALABLE(bits, scale) ((void)(scale), (bits))
#define FLOAT32_SCALED(bits, scale) encode_float32(decode_float32(bits) * (scale))
#define FLOAT64_SCALED(bits, scale) encode_float64(decode_float64(bits) * (scale))
#define BFLOAT16_SCALED(bits, scale) encode_bfloat16(decode_bfloat16(bits) * (scale))
#define FLOAT16_SCALED(bits, scale) encode_float16(decode_float16(bits) * (scale))
#define NARROW_TO_BFLOAT16(bits) encode_bfloat16(decode_float32(bits))
#define NARROW_TO_BFLOAT16_SCALED(bits, scale) encode_bfloat16(decode_float32(bits) * (scale))
#define NARROW_TO_FLOAT16(bits) encode_float16(decode_float32(bits))
#define NARROW_TO_FLOAT16_SCALED(bits, scale) encode_float16(decode_float32(bits) * (scale))
#define WIDEN_BFLOAT16(bits) encode_float32(decode_bfloat16(bits))
#define WIDEN_BFLOAT16_SCALED(bits, scale) encode_float32(decode_bfloat16(bits) * (scale))
#define WIDEN_FLOAT16(bits) encode_float32(decode_float16(bits))
#define WIDEN_FLOAT16_SCALED(bits, scale) encode_float32(decode_float16(bits) * (scale))
#define AS_INT8(bits) ((double)(int8_t)(bits))
#define AS_INT16(bits) ((double)(int16_t)(bits))
#define AS_INT32(bits) ((double)(int32_t)(bits))
#define AS_INT64(bits) ((double)(int64_t)(bits))
#define AS_UNSIGNED(bits) ((double)(bits))

DEFINE_CUDA_KERNEL(float32_float32, uint32_t, uint32_t, float, FLOAT32_SCALED, UNCHANGED, decode_float32)
DEFINE_CUDA_KERNEL(float64_float64, uint64_t, uint64_t, double, FLOAT64_SCALED, UNCHANGED, decode_float64)
DEFINE_CUDA_KERNEL(float16_float16, uint16_t, uint16_t, float, FLOAT16_SCALED, UNCHANGED, decode_float16)
DEFINE_CUDA_KERNEL(bfloat16_bfloat16, uint16_t, uint16_t, float, BFLOAT16_SCALED, UNCHANGED, decode_bfloat16)
DEFINE_CUDA_KERNEL(float32_bfloat16, uint32_t, uint16_t, float, NARROW_TO_BFLOAT16_SCALED, NARROW_TO_BFLOAT16,
                   decode_bfloat16)
DEFINE_CUDA_KERNEL(float32_float16, uint32_t, uint16_t, float, NARROW_TO_FLOAT16_SCALED, NARROW_TO_FLOAT16,
                   decode_float16)
DEFINE_CUDA_KERNEL(bfloat16_float32, uint16_t, uint32_t, float, WIDEN_BFLOAT16_SCALED, WIDEN_BFLOAT16, decode_float32)
DEFINE_CUDA_KERNEL(float16_float32, uint16_t, uint32_t, float, WIDEN_FLOAT16_SCALED, WIDEN_FLOAT16, decode_float32)
DEFINE_CUDA_KERNEL(int8_int8, uint8_t, uint8_t, float, UNSCALABLE, UNCHANGED, AS_INT8)
DEFINE_CUDA_KERNEL(int16_int16, uint16_t, uint16_t, float, UNSCALABLE, UNCHANGED, AS_INT16)
DEFINE_CUDA_KERNEL(int32_int32, uint32_t, uint32_t, float, UNSCALABLE, UNCHANGED, AS_INT32)
DEFINE_CUDA_KERNEL(int64_int64, uint64_t, uint64_t, float, UNSCALABLE, UNCHANGED, AS_INT64)
DEFINE_CUDA_KERNEL(uint8_uint8, uint8_t, uint8_t, float, UNSCALABLE, UNCHANGED, AS_UNSIGNED)
DEFINE_CUDA_KERNEL(uint16_uint16, uint16_t, uint16_t, float, UNSCALABLE, UNCHANGED, AS_UNSIGNED)
DEFINE_CUDA_KERNEL(uint32_uint32, uint32_t, uint32_t, float, UNSCALABLE, UNCHANGED, AS_UNSIGNED)
DEFINE_CUDA_KERNEL(uint64_uint64, uint64_t, uint64_t, float, UNSCALABLE, UNCHANGED, AS_UNSIGNED)

/* Null where no kernel converts the pair, or a code is not a dtype. */
static const void *mpidl_cuda_kernel(int source_dtype, int out_dtype) {
    if (source_dtype < 0 || source_dtype >= MPIDL_DTYPES || out_dtype < 0 || out_dtype >= MPIDL_DTYPES) {
        return NULL;
    }
#define CASE(FROM, TO, NAME)                      \
    case MPIDL_##FROM *MPIDL_DTYPES + MPIDL_##TO: \
        return (const void *)NAME##_cuda;
    switch (source_dtype * MPIDL_DTYPES + out_dtype) {
        CASE(FLOAT32, FLOAT32, float32_float32)
        CASE(FLOAT64, FLOAT64, float64_float64)
        CASE(FLOAT16, FLOAT16, float16_float16)
        CASE(BFLOAT16, BFLOAT16, bfloat16_bfloat16)
        CASE(FLOAT32, BFLOAT16, float32_bfloat16)
        CASE(FLOAT32, FLOAT16, float32_float16)
        CASE(BFLOAT16, FLOAT32, bfloat16_float32)
        CASE(FLOAT16, FLOAT32, float16_float32)
        CASE(INT8, INT8, int8_int8)
        CASE(INT16, INT16, int16_int16)
        CASE(INT32, INT32, int32_int32)
        CASE(INT64, INT64, int64_int64)
        CASE(UINT8, UINT8, uint8_uint8)
        CASE(UINT16, UINT16, uint16_uint16)
        CASE(UINT32, UINT32, uint32_uint32)
        CASE(UINT64, UINT64, uint64_uint64)
    }
#undef CASE
    return NULL;
}

#endif
