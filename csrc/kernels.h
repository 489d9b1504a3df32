/* The dispatch table: which kernel converts a run of elements of one dtype into another.
 *
 * Instruction sets and devices go behind mpidl_find_kernel(); nobody else knows which kernel it hands out.
 */
#ifndef MPIDL_KERNELS_H
#define MPIDL_KERNELS_H

#include <stdbool.h>

#include "mpidl.h"

/* Writes cast(element * scale) for `count` elements and adds to *packed what was written. No alignment is assumed. */
typedef void mpidl_kernel(const char *restrict source, char *restrict out, int64_t count, double scale,
                          mpidl_packed *packed);

/* Null where no kernel converts the pair, or a code is not a dtype. */
mpidl_kernel *mpidl_find_kernel(int source_dtype, int out_dtype);

int64_t mpidl_itemsize(int dtype);
bool mpidl_is_integer(int dtype);

#endif
