/* Which instruction set's kernels are in use, chosen when the program runs: by the processor, or by mpidl_use(). */
#include "kernels/kernels.h"

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>

#include "kernels/casts.h"

#if MPIDL_X86
#include <cpuid.h>

/* clang's __builtin_cpu_supports does not know it. */
static bool has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* Whether the processor has the instructions and the system saves their registers. */
int mpidl_supports(int instructions) {
    switch (instructions) {
    case MPIDL_PORTABLE:
        return 1;
#if MPIDL_X86
    case MPIDL_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case MPIDL_AVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
        return 0;
    }
}

static _Atomic int in_use = -1; /* nobody has asked yet */

int mpidl_use(int instructions) {
    if (!mpidl_supports(instructions)) {
        return MPIDL_BAD_INSTRUCTIONS;
    }
    atomic_store(&in_use, instructions);
    return MPIDL_OK;
}

int mpidl_instructions(void) {
    int set = atomic_load(&in_use);
    if (set < 0) {
        set = MPIDL_INSTRUCTION_SETS - 1; /* the best has the highest number */
        while (!mpidl_supports(set)) {
            set--;
        }
        atomic_store(&in_use, set);
    }
    return set;
}

mpidl_kernel *mpidl_find_kernel(int source_dtype, int out_dtype) {
    static mpidl_kernels *const sets[MPIDL_INSTRUCTION_SETS] = {
        [MPIDL_PORTABLE] = &mpidl_kernels_portable,
#if MPIDL_X86
        [MPIDL_AVX2] = &mpidl_kernels_avx2,
        [MPIDL_AVX512] = &mpidl_kernels_avx512,
#endif
    };
    if (source_dtype < 0 || source_dtype >= MPIDL_DTYPES || out_dtype < 0 || out_dtype >= MPIDL_DTYPES) {
        return NULL;
    }
    return (*sets[mpidl_instructions()])[source_dtype][out_dtype];
}

mpidl_reduction *mpidl_find_reduction(int dtype, int op) {
    static mpidl_reductions *const sets[MPIDL_INSTRUCTION_SETS] = {
        [MPIDL_PORTABLE] = &mpidl_reductions_portable,
#if MPIDL_X86
        [MPIDL_AVX2] = &mpidl_reductions_avx2,
        [MPIDL_AVX512] = &mpidl_reductions_avx512,
#endif
    };
    if (dtype < 0 || dtype >= MPIDL_DTYPES || op < 0 || op >= MPIDL_OPS) {
        return NULL;
    }
    return (*sets[mpidl_instructions()])[dtype][op];
}

int mpidl_reduce(const uintptr_t *sources, int32_t number, uintptr_t out, int64_t count, int dtype, int op,
                 double divisor) {
    mpidl_reduction *reduction = mpidl_find_reduction(dtype, op);
    if (!reduction) {
        return MPIDL_BAD_DTYPE;
    }
    if (number < 1 || count < 0) {
        return MPIDL_BAD_COUNT;
    }
    reduction((const char *const *)sources, number, (char *)out, count, divisor);
    return MPIDL_OK;
}

int64_t mpidl_itemsize(int dtype) {
    static const int8_t sizes[MPIDL_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    return sizes[dtype];
}

bool mpidl_is_integer(int dtype) {
    return dtype >= MPIDL_INT8;
}

double mpidl_sum_of(const double *lanes) {
    double sum = 0;
    for (int lane = 0; lane < MPIDL_LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

bool mpidl_all_finite(const char *memory, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits;
        memcpy(&bits, memory + i * (int64_t)sizeof bits, sizeof bits);
        if (!isfinite(decode_float64(bits))) {
            return false;
        }
    }
    return true;
}
