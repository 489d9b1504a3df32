/* What lies where in a segment of shared memory: flags, announcements, rings. Nothing is read or written here. */
#ifndef MPIDL_SEGMENT_H
#define MPIDL_SEGMENT_H

#include "include/mpidl_node.h"
#include "node/flags.h"

enum { SLOTS = 2, MAX_RANKS = 1024 }; /* slots: a power of two, since rounds wrap around */

typedef struct {
    int64_t signature[2];
    char padding[48];
    char small[];
} announcement;

static inline int64_t announcement_nbytes(int64_t small_nbytes) {
    return (int64_t)sizeof(announcement) + (small_nbytes + 63) / 64 * 64;
}

static inline int64_t rings_offset(int32_t ranks, int64_t small_nbytes) {
    int64_t used = ranks * ((int64_t)sizeof(mpidl_flags) + 2 * announcement_nbytes(small_nbytes));
    return (used + 4095) / 4096 * 4096;
}

static inline mpidl_flags *flags_of(const mpidl_node *node, int rank) {
    return (mpidl_flags *)node->memory + rank;
}

/* Each rank has two announcements, one for even calls and one for odd calls: while a rank fills the one, other ranks
 * may still read the other, which is of the call before.
 */
static inline announcement *announcement_of(const mpidl_node *node, int rank, uint32_t call) {
    int64_t at = node->ranks * (int64_t)sizeof(mpidl_flags);
    return (announcement *)(node->memory + at + (2 * rank + call % 2) * announcement_nbytes(node->small_nbytes));
}

/* Of `rank`'s ring: what it has staged for `other`, or, with `other` equal to `rank`, its result. */
static inline char *piece_of(const mpidl_node *node, int rank, uint32_t round, int other) {
    int64_t number = ((int64_t)rank * SLOTS + round % SLOTS) * node->ranks + other;
    return (char *)node->memory + rings_offset(node->ranks, node->small_nbytes) + number * node->piece_nbytes;
}

#endif
