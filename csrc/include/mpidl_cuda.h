/* The interface of mpidl's CUDA library: the packing of mpidl.h on a device, and what staging needs of the runtime.
 *
 * A library of its own, so that mpidl.h's loads where there is no CUDA; no torch, Python or MPI header stands here
 * either. Every call belongs to the device that it names and leaves the caller's current device as it was. Streams
 * are the caller's cudaStream_t, as numbers; 0 is the legacy default stream. mpidl/native/cuda.py is the only
 * caller.
 *
 * Besides the statuses of mpidl.h a call can return MPIDL_CUDA_ERROR plus the runtime's own error.
 */
#ifndef MPIDL_CUDA_H
#define MPIDL_CUDA_H

#include "include/mpidl.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a declaration below changes; cuda.py refuses a library that answers another number. */
#define MPIDL_CUDA_INTERFACE 1

enum mpidl_cuda_status {
    MPIDL_CUDA_NO_MEMORY = 100, /* of the host */
    MPIDL_CUDA_LATE,            /* a result was asked for after its slot had been used again */
    MPIDL_CUDA_ERROR = 1000
};

/* Calls of one table that can be under way before the next must wait for the first of them. */
enum { MPIDL_CUDA_SLOTS = 4 };

/* The frozen half of a segment table on a device, with all memory that a call needs. One thread at a time. */
typedef struct mpidl_cuda_table mpidl_cuda_table;

MPIDL_API int mpidl_cuda_table_make(int device, int64_t segments, const int64_t *counts, const int64_t *offsets,
                                    mpidl_cuda_table **table);
/* Waits for the calls that are under way. */
MPIDL_API int mpidl_cuda_table_free(mpidl_cuda_table *table);

/* As mpidl_gather and mpidl_scatter, in the order of `stream`: one copy of the addresses and one launch. Nothing is
 * allocated. Returns before anything was moved; what was written is told by mpidl_cuda_result for *ticket. `flat`
 * and the addresses lie on the device or in memory of mpidl_cuda_host_allocate.
 */
MPIDL_API int mpidl_cuda_gather(mpidl_cuda_table *table, const uintptr_t *addresses, int source_dtype, uintptr_t flat,
                                int flat_dtype, double scale, uintptr_t stream, int64_t *ticket);
MPIDL_API int mpidl_cuda_scatter(mpidl_cuda_table *table, const uintptr_t *addresses, int target_dtype, uintptr_t flat,
                                 int flat_dtype, double scale, uintptr_t stream, int64_t *ticket);
/* Waits until the call has been carried out. A ticket is good until MPIDL_CUDA_SLOTS further calls of its table. */
MPIDL_API int mpidl_cuda_result(mpidl_cuda_table *table, int64_t ticket, mpidl_packed *packed);

MPIDL_API int mpidl_cuda_allocate(int device, int64_t nbytes, uintptr_t *address);
MPIDL_API int mpidl_cuda_free(int device, uintptr_t address);
MPIDL_API int mpidl_cuda_host_allocate(int device, int64_t nbytes, uintptr_t *address); /* pinned */
MPIDL_API int mpidl_cuda_host_free(int device, uintptr_t address);
/* In stream order, between any two of device memory and pinned memory. */
MPIDL_API int mpidl_cuda_copy(int device, uintptr_t to, uintptr_t from, int64_t nbytes, uintptr_t stream);
MPIDL_API int mpidl_cuda_clear(int device, uintptr_t address, int64_t nbytes, uintptr_t stream);

/* A stream that does not wait for the legacy default stream, nor that for it. */
MPIDL_API int mpidl_cuda_stream_make(int device, uintptr_t *stream);
MPIDL_API int mpidl_cuda_stream_free(int device, uintptr_t stream);
MPIDL_API int mpidl_cuda_event_make(int device, uintptr_t *event);
MPIDL_API int mpidl_cuda_event_free(int device, uintptr_t event);
MPIDL_API int mpidl_cuda_event_record(int device, uintptr_t event, uintptr_t stream);
/* What is put on the stream from now on waits for what was recorded; the caller does not. */
MPIDL_API int mpidl_cuda_stream_wait(int device, uintptr_t stream, uintptr_t event);
MPIDL_API int mpidl_cuda_event_wait(int device, uintptr_t event);
MPIDL_API int mpidl_cuda_event_done(int device, uintptr_t event, int *done);

/* Text for a status of MPIDL_CUDA_ERROR and above. */
MPIDL_API const char *mpidl_cuda_describe(int status);
MPIDL_API int mpidl_cuda_interface(void);

#ifdef __cplusplus
}
#endif
#endif
