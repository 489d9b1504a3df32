/* How a rank writes what others read: through its caches, or past them.
 *
 * Through them is best for ranks whose cores share a cache: the reader finds the data there. Cores that share none, of
 * two sockets or of two groups of cores on one, pay for every line that the other holds before they may write it: such
 * writes take seven times as long as those past the caches (measured on Zen 4, whose groups of cores a virtual machine
 * changes while it runs). So a rank measures both, now and then, for itself: no other rank need know, and no bit
 * depends on it.
 */
#ifndef MPIDL_STORE_POLICY_H
#define MPIDL_STORE_POLICY_H

#include <stdbool.h>

#include "include/mpidl_node.h"

/* Whether the next data go past the caches; `now` in nanoseconds. Says now and then what is not the better way. */
bool mpidl_choose_stores(mpidl_store_policy *policy, int64_t now);

/* What it took. */
void mpidl_note_stores(mpidl_store_policy *policy, bool streamed, int64_t nanoseconds, int64_t nbytes);

/* The better way as far as it is known. */
bool mpidl_writes_past_caches(const mpidl_store_policy *policy);

#endif
