/* Tables on a device and the launches over them; the kernels themselves are kernel_table.h's.
 *
 * This file is C as well as CUDA: tests/cuda_host compiles it against a runtime that runs late, on the host.
 */
#include <cuda_runtime_api.h>
#include <stdlib.h>

#include "cuda/kernel_table.h"
#include "cuda/memory.h"
#include "packing/checks.h"

/* WARP_BYTES: the least that is worth a warp of its own, two accesses of each lane. BLOCKS_EACH: blocks that one
 * multiprocessor holds at a time; more would only wait.
 */
enum { WARP_BYTES = 2 * MPIDL_WARP * MPIDL_WORD, BLOCKS_EACH = 2048 / MPIDL_THREADS };

/* What one call needs until it has been carried out. */
typedef struct {
    uint64_t *addresses;        /* pinned: copied in stream order, so not to be changed before `done` */
    uint64_t *device_addresses; /* where they are copied to */
    mpidl_packed *packed;       /* pinned */
    mpidl_tally *tallies;       /* on the device, like the ticket */
    uint32_t *ticket;
    cudaEvent_t done;
} slot;

struct mpidl_cuda_table {
    int device;
    int64_t segments, total, blocks; /* blocks: at most */
    int64_t *counts;                 /* on the host, like `offsets`; for checks */
    char *pinned;                    /* one allocation of each kind for everything below */
    char *memory;
    int64_t *prefix, *offsets; /* on the device */
    slot slots[MPIDL_CUDA_SLOTS];
    int64_t calls;
};

static int64_t rounded(int64_t nbytes) {
    return (nbytes + 255) / 256 * 256;
}

/* Cuts one allocation into aligned parts; with a null base it only adds up. */
static char *cut(char *base, int64_t *used, int64_t nbytes) {
    char *part = base ? base + *used : NULL;
    *used += rounded(nbytes);
    return part;
}

static int64_t lay_out_pinned(mpidl_cuda_table *table) {
    int64_t used = 0, words = table->segments * (int64_t)sizeof(uint64_t);
    for (int k = 0; k < MPIDL_CUDA_SLOTS; k++) {
        table->slots[k].addresses = (uint64_t *)cut(table->pinned, &used, words);
        table->slots[k].packed = (mpidl_packed *)cut(table->pinned, &used, sizeof(mpidl_packed));
    }
    return used;
}

static int64_t lay_out_memory(mpidl_cuda_table *table) {
    int64_t used = 0, words = table->segments * (int64_t)sizeof(uint64_t);
    table->prefix = (int64_t *)cut(table->memory, &used, words + (int64_t)sizeof(int64_t));
    table->offsets = (int64_t *)cut(table->memory, &used, words);
    for (int k = 0; k < MPIDL_CUDA_SLOTS; k++) {
        slot *one = &table->slots[k];
        one->device_addresses = (uint64_t *)cut(table->memory, &used, words);
        one->tallies = (mpidl_tally *)cut(table->memory, &used, table->blocks * (int64_t)sizeof(mpidl_tally));
        one->ticket = (uint32_t *)cut(table->memory, &used, sizeof(uint32_t));
    }
    return used;
}

/* Everything that a table allocates on the device it allocates here; copies from memory that is not pinned have
 * completed when they return, for the buffer that they leave from.
 */
static cudaError_t fill(mpidl_cuda_table *table, const int64_t *prefix, const int64_t *offsets) {
    int processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, table->device);
    table->blocks = (int64_t)processors * BLOCKS_EACH;
    int64_t memory = lay_out_memory(table), pinned = lay_out_pinned(table);
    if (error == cudaSuccess) {
        error = cudaMalloc((void **)&table->memory, (size_t)memory);
    }
    if (error == cudaSuccess) {
        error = cudaHostAlloc((void **)&table->pinned, (size_t)pinned, cudaHostAllocPortable);
    }
    if (error != cudaSuccess) {
        return error;
    }
    lay_out_memory(table);
    lay_out_pinned(table);
    size_t words = (size_t)table->segments * sizeof(int64_t);
    error = cudaMemset(table->memory, 0, (size_t)memory); /* the tickets */
    if (error == cudaSuccess) {
        error = cudaMemcpy(table->prefix, prefix, words + sizeof(int64_t), cudaMemcpyHostToDevice);
    }
    if (error == cudaSuccess && words > 0) {
        error = cudaMemcpy(table->offsets, offsets, words, cudaMemcpyHostToDevice);
    }
    for (int k = 0; k < MPIDL_CUDA_SLOTS && error == cudaSuccess; k++) {
        error = cudaEventCreateWithFlags(&table->slots[k].done, cudaEventDisableTiming);
    }
    /* Calls come on streams that need not wait for the legacy default stream, on which the table was written. */
    return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

int mpidl_cuda_table_make(int device, int64_t segments, const int64_t *counts, const int64_t *offsets,
                          mpidl_cuda_table **made) {
    int64_t total;
    int status = mpidl_check_table(segments, counts, offsets, &total);
    if (status != MPIDL_OK) {
        return status;
    }
    mpidl_cuda_table *table = (mpidl_cuda_table *)calloc(1, sizeof *table);
    int64_t *prefix = (int64_t *)calloc((size_t)segments + 1, sizeof *prefix);
    if (table) {
        table->counts = (int64_t *)calloc((size_t)segments + 1, sizeof *table->counts);
    }
    if (!table || !prefix || !table->counts) {
        free(prefix);
        mpidl_cuda_table_free(table);
        return MPIDL_CUDA_NO_MEMORY;
    }
    for (int64_t s = 0; s < segments; s++) {
        table->counts[s] = counts[s];
        prefix[s + 1] = prefix[s] + counts[s];
    }
    table->device = device;
    table->segments = segments;
    table->total = total;
    int before;
    cudaError_t error = mpidl_cuda_enter(device, &before);
    error = error == cudaSuccess ? fill(table, prefix, offsets) : error;
    status = mpidl_cuda_leave(device, before, error);
    free(prefix);
    if (status != MPIDL_OK) {
        mpidl_cuda_table_free(table);
        return status;
    }
    *made = table;
    return MPIDL_OK;
}

int mpidl_cuda_table_free(mpidl_cuda_table *table) {
    if (!table) {
        return MPIDL_OK;
    }
    int before;
    cudaError_t error = mpidl_cuda_enter(table->device, &before);
    for (int k = 0; k < MPIDL_CUDA_SLOTS; k++) {
        if (table->slots[k].done) {
            cudaEventSynchronize(table->slots[k].done);
            cudaEventDestroy(table->slots[k].done);
        }
    }
    if (table->memory) {
        error = cudaFree(table->memory);
    }
    if (table->pinned) {
        cudaError_t other = cudaFreeHost(table->pinned);
        error = error == cudaSuccess ? other : error;
    }
    int status = mpidl_cuda_leave(table->device, before, error);
    free(table->counts);
    free(table);
    return status;
}

/* Equal shares for as many warps as the device holds at a time, in multiples of what a warp reads in one go. */
static int64_t share_of(const mpidl_cuda_table *table, int64_t itemsize) {
    int64_t warps = table->blocks * MPIDL_WARPS, step = MPIDL_WARP * MPIDL_WORD / itemsize;
    int64_t least = WARP_BYTES / itemsize, each = (table->total + warps - 1) / warps;
    return each <= least ? least : (each + step - 1) / step * step;
}

static cudaError_t launch(mpidl_cuda_table *table, slot *one, mpidl_cuda_job *job, const void *kernel,
                          const uintptr_t *addresses, cudaStream_t stream) {
    cudaError_t error = cudaEventSynchronize(one->done); /* the slot is free once its last call is through */
    if (error == cudaSuccess && table->segments > 0) {
        size_t nbytes = (size_t)table->segments * sizeof(uint64_t);
        for (int64_t s = 0; s < table->segments; s++) {
            one->addresses[s] = addresses[s];
        }
        error = cudaMemcpyAsync(one->device_addresses, one->addresses, nbytes, cudaMemcpyHostToDevice, stream);
    }
    if (error == cudaSuccess) {
        int64_t warps = (table->total + job->share - 1) / job->share;
        int64_t blocks = warps > 0 ? (warps + MPIDL_WARPS - 1) / MPIDL_WARPS : 1;
        dim3 grid = {(unsigned)blocks, 1, 1}, block = {MPIDL_THREADS, 1, 1};
        void *arguments[] = {job};
        error = cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
    }
    return error == cudaSuccess ? cudaEventRecord(one->done, stream) : error;
}

static int move(int to_flat, mpidl_cuda_table *table, const uintptr_t *addresses, int segment_dtype, uintptr_t flat,
                int flat_dtype, double scale, uintptr_t stream, int64_t *ticket) {
    int source_dtype = to_flat ? segment_dtype : flat_dtype, out_dtype = to_flat ? flat_dtype : segment_dtype;
    const void *kernel = mpidl_cuda_kernel(source_dtype, out_dtype);
    if (!kernel) {
        return MPIDL_BAD_DTYPE;
    }
    if (!mpidl_scale_fits(source_dtype, scale)) {
        return MPIDL_BAD_SCALE;
    }
    int status = mpidl_check_addresses(table->segments, addresses, table->counts, flat);
    if (status != MPIDL_OK) {
        return status;
    }
    static const int8_t sizes[MPIDL_DTYPES] = {4, 8, 2, 2, 1, 2, 4, 8, 1, 2, 4, 8};
    int8_t wider = sizes[source_dtype] > sizes[out_dtype] ? sizes[source_dtype] : sizes[out_dtype];
    slot *one = &table->slots[table->calls % MPIDL_CUDA_SLOTS];
    mpidl_cuda_job job;
    job.segments = table->segments;
    job.prefix = table->prefix;
    job.offsets = table->offsets;
    job.addresses = one->device_addresses;
    job.flat = flat;
    job.share = share_of(table, wider);
    job.scale = scale;
    job.to_flat = to_flat;
    job.ticket = one->ticket;
    job.tallies = one->tallies;
    job.packed = one->packed;
    int before;
    cudaError_t error = mpidl_cuda_enter(table->device, &before);
    if (error == cudaSuccess) {
        error = launch(table, one, &job, kernel, addresses, (cudaStream_t)stream);
    }
    *ticket = table->calls++; /* after an error too: the slot's old result is gone */
    return mpidl_cuda_leave(table->device, before, error);
}

int mpidl_cuda_gather(mpidl_cuda_table *table, const uintptr_t *addresses, int source_dtype, uintptr_t flat,
                      int flat_dtype, double scale, uintptr_t stream, int64_t *ticket) {
    return move(1, table, addresses, source_dtype, flat, flat_dtype, scale, stream, ticket);
}

int mpidl_cuda_scatter(mpidl_cuda_table *table, const uintptr_t *addresses, int target_dtype, uintptr_t flat,
                       int flat_dtype, double scale, uintptr_t stream, int64_t *ticket) {
    return move(0, table, addresses, target_dtype, flat, flat_dtype, scale, stream, ticket);
}

int mpidl_cuda_result(mpidl_cuda_table *table, int64_t ticket, mpidl_packed *packed) {
    if (ticket < 0 || ticket >= table->calls || ticket + MPIDL_CUDA_SLOTS < table->calls) {
        return MPIDL_CUDA_LATE;
    }
    slot *one = &table->slots[ticket % MPIDL_CUDA_SLOTS];
    int before;
    cudaError_t error = mpidl_cuda_enter(table->device, &before);
    error = error == cudaSuccess ? cudaEventSynchronize(one->done) : error;
    if (error == cudaSuccess) {
        *packed = *one->packed;
    }
    return mpidl_cuda_leave(table->device, before, error);
}
