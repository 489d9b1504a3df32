/* The public calls: checks first, so that nothing is written on an error, then one kernel over the segments. */
#include "checks.h"
#include "kernels.h"

/* The direction that data takes between the addressed segments and the flat buffer. */
typedef enum { TO_FLAT, FROM_FLAT } direction;

static int move(direction way, int64_t segments, const uintptr_t *addresses, const int64_t *counts,
                const int64_t *offsets, int segment_dtype, uintptr_t flat, int flat_dtype, double scale,
                mpidl_packed *packed) {
    int source_dtype = way == TO_FLAT ? segment_dtype : flat_dtype;
    mpidl_kernel *kernel = mpidl_find_kernel(source_dtype, way == TO_FLAT ? flat_dtype : segment_dtype);
    if (!kernel) {
        return MPIDL_BAD_DTYPE;
    }
    if (!mpidl_scale_fits(source_dtype, scale)) {
        return MPIDL_BAD_SCALE;
    }
    int status = packed ? mpidl_check_table(segments, counts, offsets) : MPIDL_BAD_ADDRESS;
    if (status == MPIDL_OK) {
        status = mpidl_check_addresses(segments, addresses, counts, flat);
    }
    if (status != MPIDL_OK) {
        return status;
    }
    *packed = (mpidl_packed){.finite = 1};
    for (int64_t s = 0; s < segments; s++) {
        if (counts[s] == 0) {
            continue;
        }
        char *segment = (char *)addresses[s];
        char *run = (char *)flat + offsets[s] * mpidl_itemsize(flat_dtype);
        kernel(way == TO_FLAT ? segment : run, way == TO_FLAT ? run : segment, counts[s], scale, packed);
    }
    return MPIDL_OK;
}

int mpidl_gather(int64_t segments, const uintptr_t *addresses, const int64_t *counts, const int64_t *offsets,
                 int source_dtype, uintptr_t flat, int flat_dtype, double scale, mpidl_packed *packed) {
    return move(TO_FLAT, segments, addresses, counts, offsets, source_dtype, flat, flat_dtype, scale, packed);
}

int mpidl_scatter(int64_t segments, const uintptr_t *addresses, const int64_t *counts, const int64_t *offsets,
                  int target_dtype, uintptr_t flat, int flat_dtype, double scale, mpidl_packed *packed) {
    return move(FROM_FLAT, segments, addresses, counts, offsets, target_dtype, flat, flat_dtype, scale, packed);
}

int mpidl_interface(void) {
    return MPIDL_INTERFACE;
}
