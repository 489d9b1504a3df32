/* The kernels for x86-64 processors with AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4 and later), by intrinsics. */
#include "kernels/kernels.h"

#if MPIDL_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include <immintrin.h>

#include "kernels/loops.h"
#include "kernels/reductions.h"

typedef __m512 floats;
typedef struct {
    __m512d low, high;
} doubles;
typedef __m256i halves;

MPIDL_INLINE floats floats_load(const char *memory) {
    return _mm512_loadu_ps(memory);
}

MPIDL_INLINE void floats_store(char *memory, floats values) {
    _mm512_storeu_ps(memory, values);
}

MPIDL_INLINE void floats_stream(char *memory, floats values) {
    _mm512_stream_ps((float *)memory, values);
}

MPIDL_INLINE doubles doubles_load(const char *memory) {
    return (doubles){_mm512_loadu_pd(memory), _mm512_loadu_pd(memory + 64)};
}

MPIDL_INLINE void doubles_store(char *memory, doubles values) {
    _mm512_storeu_pd(memory, values.low);
    _mm512_storeu_pd(memory + 64, values.high);
}

MPIDL_INLINE void doubles_stream(char *memory, doubles values) {
    _mm512_stream_pd((double *)memory, values.low);
    _mm512_stream_pd((double *)memory + 8, values.high);
}

MPIDL_INLINE halves halves_load(const char *memory) {
    return _mm256_loadu_si256((const __m256i *)memory);
}

MPIDL_INLINE void halves_store(char *memory, halves bits) {
    _mm256_storeu_si256((__m256i *)memory, bits);
}

MPIDL_INLINE void stream_end(void) {
    _mm_sfence();
}

MPIDL_INLINE floats floats_times(floats values, double scale) {
    return _mm512_mul_ps(values, _mm512_set1_ps((float)scale));
}

MPIDL_INLINE doubles doubles_times(doubles values, double scale) {
    __m512d factor = _mm512_set1_pd(scale);
    return (doubles){_mm512_mul_pd(values.low, factor), _mm512_mul_pd(values.high, factor)};
}

MPIDL_INLINE doubles doubles_squares(doubles sums, doubles values) {
    return (doubles){_mm512_add_pd(sums.low, _mm512_mul_pd(values.low, values.low)),
                     _mm512_add_pd(sums.high, _mm512_mul_pd(values.high, values.high))};
}

/* Fused or not: the square of a float is exact in a double. */
MPIDL_INLINE doubles floats_squares(doubles sums, floats values) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
    return (doubles){_mm512_fmadd_pd(low, low, sums.low), _mm512_fmadd_pd(high, high, sums.high)};
}

/* Where `bits` are a NaN, them as a quiet one; elsewhere `others`. */
MPIDL_INLINE __m512i quiet_or(__m512i bits, __m512i others) {
    __m512 value = _mm512_castsi512_ps(bits);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(others, nan, bits, _mm512_set1_epi32(0x00400000));
}

MPIDL_INLINE void quiet(floats *values) {
    __m512i bits = _mm512_castps_si512(*values);
    *values = _mm512_castsi512_ps(quiet_or(bits, bits));
}

MPIDL_INLINE floats widen_bfloat16(halves bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* As encode_bfloat16. The instruction for it, of AVX512_BF16, takes subnormals for zeros. */
MPIDL_INLINE halves narrow_bfloat16(floats *values) {
    __m512i bits = _mm512_castps_si512(*values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i kept = quiet_or(bits, rounded);
    *values = _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

MPIDL_INLINE floats widen_float16(halves bits) {
    return _mm512_cvtph_ps(bits);
}

MPIDL_INLINE halves narrow_float16(floats *values) {
    halves bits = _mm512_cvtps_ph(*values, _MM_FROUND_TO_NEAREST_INT);
    *values = _mm512_cvtph_ps(bits);
    return bits;
}

#include "kernels/vectors.h"

mpidl_kernels mpidl_kernels_avx512 = MPIDL_TABLE;
mpidl_reductions mpidl_reductions_avx512 = MPIDL_REDUCTION_TABLE;

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
