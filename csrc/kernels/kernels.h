/* Which kernel converts a run of elements of one dtype into another, and how a kernel is called.
 *
 * Instruction sets stand behind mpidl_find_kernel(); nobody else knows which kernel it hands out.
 */
#ifndef MPIDL_KERNELS_H
#define MPIDL_KERNELS_H

#include <stdbool.h>

#include "include/mpidl.h"
#include "include/mpidl_node.h"

/* The sum of squares is kept as this many partial sums: element i of a run goes to number i mod MPIDL_LANES. Additions
 * need not wait for each other, and since the number is fixed all instruction sets give the same bits.
 */
enum { MPIDL_LANES = 16 };

/* Writes cast(element * scale) for `count` elements and adds the squares of what was written to lanes[MPIDL_LANES].
 * No alignment is assumed. `streamed`: past the caches, if the kernel can; it changes no bit.
 */
typedef void mpidl_kernel(const char *restrict source, char *restrict out, int64_t count, double scale, bool streamed,
                          double *restrict lanes);

/* Row: dtype of the source. Column: of what is written. */
typedef mpidl_kernel *const mpidl_kernels[MPIDL_DTYPES][MPIDL_DTYPES];

/* Writes op(sources[0], sources[1], ...) / divisor for `count` elements to `out`. Each source lies apart from `out`, or
 * begins where it does.
 */
typedef void mpidl_reduction(const char *const *sources, int ranks, char *out, int64_t count, double divisor);

/* Row: dtype. Column: mpidl_op. */
typedef mpidl_reduction *const mpidl_reductions[MPIDL_DTYPES][MPIDL_OPS];

/* One per instruction set; gcc and clang compile those of x86-64 whatever processor they run on. */
extern mpidl_kernels mpidl_kernels_portable;
extern mpidl_reductions mpidl_reductions_portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define MPIDL_X86 1
extern mpidl_kernels mpidl_kernels_avx2, mpidl_kernels_avx512;
extern mpidl_reductions mpidl_reductions_avx2, mpidl_reductions_avx512;
#else
#define MPIDL_X86 0
#endif

/* Of the set in use; null where no kernel converts the pair, or a code is not a dtype. */
mpidl_kernel *mpidl_find_kernel(int source_dtype, int out_dtype);
mpidl_reduction *mpidl_find_reduction(int dtype, int op);

/* Of the partial sums of a kernel's calls. */
double mpidl_sum_of(const double *lanes);

/* Of float64: squares of those can overflow where no value is infinite. Squares of anything narrower are finite in a
 * double, and so is the sum of 2^63 of them.
 */
bool mpidl_all_finite(const char *memory, int64_t count);

int64_t mpidl_itemsize(int dtype);
bool mpidl_is_integer(int dtype);

#endif
