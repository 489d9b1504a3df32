/* Included before all else: whatever the processor, it is said to run AVX-512, which immintrin.h beside makes true. */
#define __builtin_cpu_supports(name) (__builtin_strncmp(name, "avx512", 6) == 0 || __builtin_cpu_supports(name))
