/* Reading a range of a table of segments, scaled and cast; see mpidl.h for tables and mpidl_node.h for who asks. */
#ifndef MPIDL_TABLE_H
#define MPIDL_TABLE_H

#include "include/mpidl_node.h"

/* Writes elements [place, place + count) of the table's flat order to `out`; notes in job->finite if some are not. */
void mpidl_gather_range(mpidl_job *job, int64_t place, int64_t count, char *out);

#endif
