/* A variable in memory that the ranks of a node share, cut in blocks with a lock each: the interface of center.c.
 *
 * A call never blocks for longer than its patience, so that its caller can look after signals and lost peers between
 * two calls. mpidl/native/center.py is the only caller.
 */
#ifndef MPIDL_CENTER_H
#define MPIDL_CENTER_H

#include "include/mpidl.h"

/* One rank's view. `memory` was zero before the first rank came, lies on a page's beginning, and is where
 * mpidl_center_nbytes() bytes are mapped; count, block and dtype are alike on all ranks.
 */
typedef struct {
    uintptr_t memory;
    int64_t count;   /* elements */
    int64_t block;   /* elements that one lock guards; a multiple of 64 */
    int32_t dtype;   /* MPIDL_FLOAT32 or MPIDL_FLOAT64 */
    uint32_t holder; /* what this rank's locks are marked with, no other rank's, and not 0 */
} mpidl_center;

/* One pass over the elements [start, start + count): block by block, under the block's lock, it
 *   writes them to `before`, unless that is 0;
 *   adds values * scale, the product rounded, or with `replaces` puts the values there; not if `values` is 0;
 *   writes them, as they are now, to `after`, unless that is 0.
 * The three hold elements of the variable's dtype, of any alignment, the first one for `start`; they lie apart.
 */
typedef struct {
    int64_t start, count;
    uintptr_t values, before, after;
    double scale;
    int32_t replaces;
    int32_t waits_for; /* out: who holds the block that a pass stopped at */
    int64_t done;      /* how many elements it has passed; 0 at first */
} mpidl_pass;

/* 0 where the arguments make no sense. */
MPIDL_API int64_t mpidl_center_nbytes(int64_t count, int64_t block, int dtype);

/* Moves a pass on: 0 when it is over, 1 if for `patience` nanoseconds others held the next block's lock, or minus an
 * mpidl_status if it cannot be carried out.
 */
MPIDL_API int mpidl_center_move(const mpidl_center *center, mpidl_pass *pass, int64_t patience);

/* Frees the lock at which a pass stopped, if `dead`, whose process is no more, still holds it: 0, or 1 if the block
 * was being changed when it died, and stays locked; or minus an mpidl_status. Any number of ranks may call it at once.
 */
MPIDL_API int mpidl_center_take_away(const mpidl_center *center, const mpidl_pass *pass, uint32_t dead);

#endif
