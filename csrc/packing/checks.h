/* What is checked before anything is written, alike for memory of the processor and of a device. */
#ifndef MPIDL_CHECKS_H
#define MPIDL_CHECKS_H

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "include/mpidl.h"

/* A scale that the arithmetic cannot hold would turn every element into an infinity or a zero. */
static inline bool mpidl_scale_fits(int dtype, double scale) {
    if (dtype >= MPIDL_INT8) {
        return scale == 1.0;
    }
    if (dtype == MPIDL_FLOAT64) {
        return isfinite(scale);
    }
    return fabs(scale) <= FLT_MAX && ((float)scale != 0 || scale == 0);
}

/* Adds up the counts too. */
static inline int mpidl_check_table(int64_t segments, const int64_t *counts, const int64_t *offsets, int64_t *total) {
    if (segments < 0) {
        return MPIDL_BAD_COUNT;
    }
    if (segments > 0 && (!counts || !offsets)) {
        return MPIDL_BAD_ADDRESS;
    }
    /* Below this limit no sum or product with an itemsize overflows. */
    const int64_t limit = INT64_MAX / 32;
    *total = 0;
    for (int64_t s = 0; s < segments; s++) {
        if (counts[s] < 0 || counts[s] > limit - *total || offsets[s] < 0 || offsets[s] > limit) {
            return MPIDL_BAD_COUNT;
        }
        *total += counts[s];
    }
    return MPIDL_OK;
}

/* For a table that has been checked. */
static inline int mpidl_check_addresses(int64_t segments, const uintptr_t *addresses, const int64_t *counts,
                                        uintptr_t flat) {
    if (segments > 0 && !addresses) {
        return MPIDL_BAD_ADDRESS;
    }
    for (int64_t s = 0; s < segments; s++) {
        if (counts[s] > 0 && (!addresses[s] || !flat)) {
            return MPIDL_BAD_ADDRESS;
        }
    }
    return MPIDL_OK;
}

#endif
