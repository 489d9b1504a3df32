/* See gather_range.h. */
#include "packing/gather_range.h"

#include <math.h>
#include <string.h>

#include "kernels/casts.h"
#include "kernels/kernels.h"

/* The segment in which element `place` lies. */
static int64_t segment_at(const mpidl_job *job, int64_t place) {
    int64_t low = 0, high = job->segments;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (job->offsets[middle] <= place) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

void mpidl_gather_range(mpidl_job *job, int64_t place, int64_t count, char *out) {
    mpidl_kernel *kernel = mpidl_find_kernel(job->source_dtype, job->dtype);
    const int64_t source_item = mpidl_itemsize(job->source_dtype), item = mpidl_itemsize(job->dtype);
    double lanes[MPIDL_LANES] = {0};
    char *first = out;
    int64_t left = count;
    for (int64_t s = left > 0 ? segment_at(job, place) : job->segments; left > 0 && s < job->segments; s++) {
        int64_t skipped = place - job->offsets[s];
        int64_t run = job->counts[s] - skipped < left ? job->counts[s] - skipped : left;
        if (run <= 0) {
            continue;
        }
        if (job->addresses[s]) {
            kernel((const char *)job->addresses[s] + skipped * source_item, out, run, job->scale, false, lanes);
        } else {
            memset(out, 0, (size_t)(run * item));
        }
        out += run * item;
        place += run;
        left -= run;
    }
    if (!isfinite(mpidl_sum_of(lanes)) && (job->dtype != MPIDL_FLOAT64 || !mpidl_all_finite(first, count))) {
        job->finite = 0;
    }
}
