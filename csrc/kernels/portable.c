/* The kernels in plain C, for any processor. */
#include "kernels/loops.h"
#include "kernels/reductions.h"

#define FLOAT32_TO_BFLOAT16(bits) encode_bfloat16(decode_float32(bits))
#define FLOAT32_TO_FLOAT16(bits) encode_float16(decode_float32(bits))
#define BFLOAT16_TO_FLOAT32(bits) encode_float32(decode_bfloat16(bits))
#define FLOAT16_TO_FLOAT32(bits) encode_float32(decode_float16(bits))

#define DEFINE_FLOAT(NAME, BLOCK, FROM, TO, IN, OUT, UNSCALED) \
    DEFINE_LOOP(NAME, BLOCK, FROM, TO, float, decode_##IN, encode_##OUT, decode_##OUT, UNSCALED)

DEFINE_FLOAT(float32_float32, FUSED, uint32_t, uint32_t, float32, float32, AS_IT_IS)
DEFINE_FLOAT(float32_bfloat16, SPLIT, uint32_t, uint16_t, float32, bfloat16, FLOAT32_TO_BFLOAT16)
DEFINE_FLOAT(float32_float16, SPLIT, uint32_t, uint16_t, float32, float16, FLOAT32_TO_FLOAT16)
DEFINE_FLOAT(bfloat16_bfloat16, SPLIT, uint16_t, uint16_t, bfloat16, bfloat16, AS_IT_IS)
DEFINE_FLOAT(bfloat16_float32, SPLIT, uint16_t, uint32_t, bfloat16, float32, BFLOAT16_TO_FLOAT32)
DEFINE_FLOAT(float16_float16, SPLIT, uint16_t, uint16_t, float16, float16, AS_IT_IS)
DEFINE_FLOAT(float16_float32, SPLIT, uint16_t, uint32_t, float16, float32, FLOAT16_TO_FLOAT32)
DEFINE_LOOP(float64_float64, FUSED, uint64_t, uint64_t, double, decode_float64, encode_float64, decode_float64,
            AS_IT_IS)

mpidl_kernels mpidl_kernels_portable = MPIDL_TABLE;
mpidl_reductions mpidl_reductions_portable = MPIDL_REDUCTION_TABLE;
