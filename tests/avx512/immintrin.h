/* <immintrin.h> for csrc/kernels/avx512.c on any processor: AVX-512 in plain C by SIMDe (apt-get install libsimde-dev).
 *
 * What SIMDe 0.7.4 lacks stands below, element by element, as Intel's guide describes it.
 */
#ifndef MPIDL_TESTS_IMMINTRIN_H
#define MPIDL_TESTS_IMMINTRIN_H

#ifndef __AVX512F__ /* another source */
#include_next <immintrin.h>
#else

/* The source has asked for AVX-512; from here on the compiler may use only what every x86-64 processor runs. */
#pragma GCC reset_options
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

typedef simde__mmask16 __mmask16;

#define PER_ELEMENT static inline __attribute__((always_inline, unused))
#define EACH(i, count) for (int i = 0; i < (count); i++)

/* A register as an array, and back. */
#define SPREAD(TYPE, name, register_)            \
    TYPE name[sizeof(register_) / sizeof(TYPE)]; \
    memcpy(name, &(register_), sizeof name)
#define GATHERED(TYPE, array)                  \
    TYPE gathered;                             \
    memcpy(&gathered, array, sizeof gathered); \
    return gathered

PER_ELEMENT __m512i _mm512_cvtepu16_epi32(__m256i a) {
    SPREAD(uint16_t, from, a);
    uint32_t to[16];
    EACH(i, 16) to[i] = from[i];
    GATHERED(__m512i, to);
}

PER_ELEMENT __m256i _mm512_cvtepi32_epi16(__m512i a) {
    SPREAD(uint32_t, from, a);
    uint16_t to[16];
    EACH(i, 16) to[i] = (uint16_t)from[i];
    GATHERED(__m256i, to);
}

PER_ELEMENT __m512d _mm512_cvtps_pd(__m256 a) {
    SPREAD(float, from, a);
    double to[8];
    EACH(i, 8) to[i] = from[i];
    GATHERED(__m512d, to);
}

PER_ELEMENT __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
    SPREAD(float, from, a);
    GATHERED(__m256, from + 8 * half);
}

/* The compiler's own conversions: casts.h has another way, which the tests compare with this one. */
PER_ELEMENT __m512 _mm512_cvtph_ps(__m256i a) {
    SPREAD(_Float16, from, a);
    float to[16];
    EACH(i, 16) to[i] = (float)from[i];
    GATHERED(__m512, to);
}

PER_ELEMENT __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
    (void)rounding; /* to nearest, which the compiler's is too */
    SPREAD(float, from, a);
    _Float16 to[16];
    EACH(i, 16) to[i] = (_Float16)from[i];
    GATHERED(__m256i, to);
}

/* A place that is not aligned is a fault, as on the processor. */
static inline void must_be_aligned(const void *memory) {
    if ((uintptr_t)memory % 64 != 0) {
        __builtin_trap();
    }
}

PER_ELEMENT void _mm512_stream_ps(void *memory, __m512 a) {
    must_be_aligned(memory);
    memcpy(memory, &a, sizeof a);
}

PER_ELEMENT void _mm512_stream_pd(void *memory, __m512d a) {
    must_be_aligned(memory);
    memcpy(memory, &a, sizeof a);
}

#endif
#endif
