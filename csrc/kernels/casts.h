/* How an element is read into the type that arithmetic is done in, and written back: decode_* and encode_*.
 *
 * Without branches or table look-ups, so that the compiler's vectoriser takes the loops around them. They agree bit
 * for bit with torch's casts except that a NaN keeps its sign and the top of its payload; it always ends up quiet.
 * None relies on subnormal arithmetic: torch.set_flush_denormal(True) changes no result.
 */
#ifndef MPIDL_CASTS_H
#define MPIDL_CASTS_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MPIDL_INLINE static __host__ __device__ __forceinline__
#else
#define MPIDL_INLINE static inline __attribute__((always_inline))
#endif

MPIDL_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

MPIDL_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MPIDL_INLINE float decode_float32(uint32_t bits) {
    return float_of(bits);
}

MPIDL_INLINE uint32_t encode_float32(float value) {
    return bits_of(value);
}

MPIDL_INLINE double decode_float64(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MPIDL_INLINE uint64_t encode_float64(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

MPIDL_INLINE uint32_t quieted(uint32_t bits) {
    return bits | ((bits & 0x7fffffffu) > 0x7f800000u ? 0x00400000u : 0u);
}

MPIDL_INLINE float decode_bfloat16(uint16_t bits) {
    return float_of(quieted((uint32_t)bits << 16));
}

MPIDL_INLINE uint16_t encode_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    /* Ties to even: half a unit less one, plus the bit that decides. A carry moves into the exponent, rightly. */
    uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    uint32_t kept = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : rounded;
    return (uint16_t)(kept >> 16);
}

MPIDL_INLINE float decode_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13; /* exponent and fraction where float32 has them */
    uint32_t normal = magnitude + (112u << 23);            /* biases 127 and 15 */
    uint32_t special = quieted(magnitude + (224u << 23));  /* all ones in the exponent stay all ones */
    /* Subnormal: 2^-14 + fraction * 2^-24 less 2^-14, exact and never subnormal in float32. */
    uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000u) - 0x1p-14f);
    uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
    return float_of(sign | (magnitude >= (31u << 23) ? special : bits));
}

MPIDL_INLINE uint16_t encode_float16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    /* Rounded as above; from 65520 on the carry makes it an infinity. */
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    /* Below 2^-14: in [0.5, 1) a unit is 2^-24, float16's smallest, so the addition itself rounds. */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? nan : half;
    return (uint16_t)(sign | half);
}

#endif
