/* CUDA's runtime on the host, for the tests: as late as CUDA may be, and as strict.
 *
 * What is put on a stream is carried out when somebody waits for it, and then only that stream, as far as needed; a
 * stream that waits for an event takes the event's stream along as far as there. A forgotten wait thus always shows:
 * the data are not there yet. Asking whether an event is done carries out one thing on its stream. Memory of the
 * device cannot be read or written by the host: outside of this file touching it is a segmentation fault.
 */
#include "cuda_runtime_api.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda/kernel_bodies.h"

enum { DEVICES = 2, PROCESSORS = 3 };

typedef enum { COPY, CLEAR, KERNEL, RECORD, WAIT } deed;

typedef struct operation {
    deed what;
    void *to;
    const void *from;
    size_t nbytes;
    int value;
    cudaEvent_t event;
    uint64_t mark; /* which record of the event */
    void (*kernel)(mpidl_cuda_job);
    int64_t blocks;
    mpidl_cuda_job job;
    struct operation *next;
} operation;

struct host_stream {
    operation *first, **last;
};
struct host_event {
    cudaStream_t stream;
    uint64_t recorded, reached;
    struct host_event *older; /* all that were ever made */
};

int64_t mpidl_host_block, mpidl_host_blocks;
int64_t cuda_host_launches; /* for the tests */
int64_t cuda_host_allocations;
int64_t cuda_host_copies;

static struct host_stream default_stream;
static cudaEvent_t events;
static int current_device;
static char *arena;
static size_t arena_used, last_start;
static const size_t ARENA = (size_t)1 << 31;
static int shared;

/* For the tests too: what a framework's own kernel on the device would touch. */
void cuda_host_open(int open) {
    if (arena_used > 0) {
        mprotect(arena, arena_used, open || shared ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
}

/* For the tests: an MPI that works on the device's memory itself would touch it any time. */
void cuda_host_share(int share) {
    shared = share;
    cuda_host_open(0);
}

static cudaStream_t stream_of(cudaStream_t stream) {
    stream = stream ? stream : &default_stream;
    if (!stream->last) {
        stream->last = &stream->first;
    }
    return stream;
}

static cudaError_t put(cudaStream_t stream, operation wanted) {
    operation *one = malloc(sizeof *one);
    if (!one) {
        return cudaErrorMemoryAllocation;
    }
    *one = wanted;
    one->next = NULL;
    stream = stream_of(stream);
    *stream->last = one;
    stream->last = &one->next;
    return cudaSuccess;
}

static void carry_out_until(cudaEvent_t event, uint64_t mark);

static void carry_out_one(cudaStream_t stream) {
    operation *one = stream->first;
    if (one->what == WAIT) {
        carry_out_until(one->event, one->mark);
    }
    cuda_host_open(1);
    if (one->what == COPY) {
        memcpy(one->to, one->from, one->nbytes);
    } else if (one->what == CLEAR) {
        memset(one->to, one->value, one->nbytes);
    } else if (one->what == KERNEL) {
        mpidl_host_blocks = one->blocks;
        for (int64_t block = 0; block < one->blocks; block++) {
            mpidl_host_block = (block * 7 + 3) % one->blocks; /* any order will do */
            if (one->blocks % 7 == 0) {
                mpidl_host_block = one->blocks - 1 - block;
            }
            one->kernel(one->job);
        }
    } else if (one->what == RECORD) {
        one->event->reached = one->mark;
    }
    cuda_host_open(0);
    stream->first = one->next;
    if (!stream->first) {
        stream->last = &stream->first;
    }
    free(one);
}

static void carry_out_until(cudaEvent_t event, uint64_t mark) {
    while (event->reached < mark) {
        carry_out_one(event->stream);
    }
}

/* For the tests: what a user's own synchronisation would do. */
void cuda_host_finish(cudaStream_t stream) {
    stream = stream_of(stream);
    while (stream->first) {
        carry_out_one(stream);
    }
}

int cuda_host_owns(const void *memory) {
    return arena && (const char *)memory >= arena && (const char *)memory < arena + arena_used;
}

/* For the tests, whose arrays lie in the host's memory or the device's: reads or writes without regard to order. */
void cuda_host_peek(void *to, const void *from, size_t nbytes) {
    cuda_host_open(1);
    memcpy(to, from, nbytes);
    cuda_host_open(0);
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) {
        return cudaErrorInvalidDevice;
    }
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = PROCESSORS;
    return attribute == cudaDevAttrMultiProcessorCount && device < DEVICES ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceSynchronize(void) {
    cuda_host_finish(NULL);
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "an error";
}

/* What was freed is used again only if it was the last, so that use after that mostly shows. New memory is not clean.
 */
cudaError_t cudaMalloc(void **memory, size_t nbytes) {
    if (!arena) {
        arena = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    size_t whole = (nbytes + 256 + 4095) / 4096 * 4096;
    if (arena == MAP_FAILED || arena_used + whole > ARENA) {
        return cudaErrorMemoryAllocation;
    }
    last_start = arena_used;
    *memory = arena + arena_used;
    arena_used += whole;
    cuda_host_allocations++;
    cuda_host_open(1);
    memset(*memory, 0xa5, nbytes);
    cuda_host_open(0);
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    if (memory == arena + last_start) {
        mprotect(memory, arena_used - last_start, PROT_NONE);
        arena_used = last_start;
    }
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **memory, size_t nbytes, unsigned flags) {
    (void)flags;
    *memory = aligned_alloc(256, (nbytes + 511) / 256 * 256);
    cuda_host_allocations++;
    if (*memory) {
        memset(*memory, 0xa5, nbytes);
    }
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *memory, int value, size_t nbytes) {
    return cudaMemsetAsync(memory, value, nbytes, NULL);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t nbytes, int kind) {
    cudaError_t error = cudaMemcpyAsync(to, from, nbytes, kind, NULL);
    cuda_host_finish(NULL);
    return error;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t nbytes, int kind, cudaStream_t stream) {
    (void)kind;
    cuda_host_copies++;
    return put(stream, (operation){.what = COPY, .to = to, .from = from, .nbytes = nbytes});
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t nbytes, cudaStream_t stream) {
    return put(stream, (operation){.what = CLEAR, .to = memory, .value = value, .nbytes = nbytes});
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    if (grid.x == 0 || block.x != MPIDL_THREADS || shared != 0) {
        return cudaErrorInvalidValue;
    }
    cuda_host_launches++;
    const mpidl_cuda_job *job = arguments[0];
    return put(stream,
               (operation){.what = KERNEL, .kernel = (void (*)(mpidl_cuda_job))kernel, .blocks = grid.x, .job = *job});
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    return *stream ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cuda_host_finish(stream);
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)flags;
    return put(stream, (operation){.what = WAIT, .event = event, .mark = event->recorded});
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    if (!*event) {
        return cudaErrorMemoryAllocation;
    }
    (*event)->older = events;
    events = *event;
    return cudaSuccess;
}

/* CUDA keeps what streams still wait for; here all of it is kept. */
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->stream = stream_of(stream);
    event->recorded++;
    return put(stream, (operation){.what = RECORD, .event = event, .mark = event->recorded});
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    carry_out_until(event, event->recorded);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->reached < event->recorded) {
        carry_out_one(event->stream);
    }
    return event->reached < event->recorded ? cudaErrorNotReady : cudaSuccess;
}
