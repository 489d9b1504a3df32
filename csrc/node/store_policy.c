/* See store_policy.h. */
#include "node/store_policy.h"

/* Turns that alternate at first; nanoseconds from one look at the other way to the next; bytes that say something. */
enum { FIRST_TURNS = 8, LOOKING = 20000000, LEAST_NBYTES = 16384 };

/* How many times as long writing through the caches must take to be given up, and to be taken up again. Measured: 0.4
 * to 1.3 where cores share a cache, 7 to 12 where they do not. What the reader has of it is not seen here.
 */
static const double GIVEN_UP = 3, TAKEN_UP = 2;

/* Whoever loses its core for a moment takes longer, nothing makes it faster: costs fall at once, and rise slowly. */
static const double RISE = 1.25;

bool mpidl_writes_past_caches(const mpidl_writing *writing) {
    return writing->wish == MPIDL_BY_MEASUREMENT ? writing->streams : writing->wish == MPIDL_PAST_CACHES;
}

bool mpidl_choose_writing(mpidl_writing *writing, int64_t now) {
    if (writing->wish != MPIDL_BY_MEASUREMENT) {
        return writing->wish == MPIDL_PAST_CACHES;
    }
    if (writing->turns < FIRST_TURNS) {
        return writing->turns++ % 2;
    }
    if (now - writing->looked >= LOOKING) {
        writing->looked = now;
        return !writing->streams;
    }
    return writing->streams;
}

void mpidl_note_writing(mpidl_writing *writing, bool streamed, int64_t nanoseconds, int64_t nbytes) {
    if (nbytes < LEAST_NBYTES) {
        return;
    }
    double cost = (double)(nanoseconds + 1) / (double)nbytes, *least = &writing->costs[streamed];
    double highest = *least * RISE;
    *least = *least == 0 || cost < highest ? cost : highest;
    if (writing->costs[false] > 0 && writing->costs[true] > 0) {
        writing->streams = writing->costs[false] > (writing->streams ? TAKEN_UP : GIVEN_UP) * writing->costs[true];
    }
}
