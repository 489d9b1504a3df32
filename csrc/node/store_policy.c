/* See store_policy.h. */
#include "node/store_policy.h"

/* Pieces at first that alternate between the two ways; nanoseconds from one look at the other way to the next; bytes
 * that say something. */
enum { FIRST_PIECES = 8, LOOKING = 20000000, LEAST_NBYTES = 16384 };

/* How many times as long writing through the caches must take to be given up, and to be taken up again. Measured: 0.4
 * to 1.3 where cores share a cache, 7 to 12 where they do not. What the reader has of it is not seen here.
 */
static const double GIVEN_UP = 3, TAKEN_UP = 2;

/* Whoever loses its core for a moment takes longer, nothing makes it faster: costs fall at once, and rise slowly. */
static const double RISE = 1.25;

bool mpidl_writes_past_caches(const mpidl_store_policy *policy) {
    return policy->wish == MPIDL_BY_MEASUREMENT ? policy->streams : policy->wish == MPIDL_PAST_CACHES;
}

bool mpidl_choose_stores(mpidl_store_policy *policy, int64_t now) {
    if (policy->wish != MPIDL_BY_MEASUREMENT) {
        return policy->wish == MPIDL_PAST_CACHES;
    }
    if (policy->pieces < FIRST_PIECES) {
        return policy->pieces++ % 2;
    }
    if (now - policy->looked >= LOOKING) {
        policy->looked = now;
        return !policy->streams;
    }
    return policy->streams;
}

void mpidl_note_stores(mpidl_store_policy *policy, bool streamed, int64_t nanoseconds, int64_t nbytes) {
    if (nbytes < LEAST_NBYTES) {
        return;
    }
    double cost = (double)(nanoseconds + 1) / (double)nbytes, *least = &policy->costs[streamed];
    double highest = *least * RISE;
    *least = *least == 0 || cost < highest ? cost : highest;
    if (policy->costs[false] > 0 && policy->costs[true] > 0) {
        policy->streams = policy->costs[false] > (policy->streams ? TAKEN_UP : GIVEN_UP) * policy->costs[true];
    }
}
