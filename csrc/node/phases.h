/* What a rank does in one phase of a collective: which kinds need it, and with what data.
 *
 * When a phase may begin is decided in schedule.c.
 */
#ifndef MPIDL_TURNS_H
#define MPIDL_TURNS_H

#include <stdbool.h>

#include "include/mpidl_node.h"

/* Which phases a kind has on this rank. */
bool mpidl_stages(const mpidl_job *job);
bool mpidl_produces(const mpidl_node *node, const mpidl_job *job);
bool mpidl_consumes(const mpidl_node *node, const mpidl_job *job);

/* How many rounds, each with a slice for every rank. */
int64_t mpidl_rounds_of(const mpidl_node *node, const mpidl_job *job);

/* Writes what the others need of this rank's input to its ring; its own slice's result to the ring or the output; a
 * rank's result from its ring to the output.
 */
void mpidl_stage(mpidl_node *node, mpidl_job *job, int64_t round);
void mpidl_produce(mpidl_node *node, mpidl_job *job, int64_t round);
void mpidl_consume(const mpidl_node *node, const mpidl_job *job, int64_t round, int from_rank);

/* Data that stand beside the announcements: whether a job's do, writing this rank's, and taking what it needs. */
bool mpidl_is_small(const mpidl_node *node, const mpidl_job *job);
void mpidl_give_small(const mpidl_node *node, mpidl_job *job, char *out);
void mpidl_take_small(const mpidl_node *node, mpidl_job *job);

#endif
