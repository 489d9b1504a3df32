/* Memory, streams and events: what staging needs of CUDA's runtime, each call on the device that it names. */
#include "cuda/memory.h"

/* Evaluates CALL, an expression of type cudaError_t, on `device`. */
#define ON_DEVICE(CALL)                                        \
    do {                                                       \
        int before;                                            \
        cudaError_t error = mpidl_cuda_enter(device, &before); \
        if (error == cudaSuccess) {                            \
            error = (CALL);                                    \
        }                                                      \
        return mpidl_cuda_leave(device, before, error);        \
    } while (0)

int mpidl_cuda_allocate(int device, int64_t nbytes, uintptr_t *address) {
    ON_DEVICE(cudaMalloc((void **)address, (size_t)nbytes));
}

int mpidl_cuda_free(int device, uintptr_t address) {
    ON_DEVICE(cudaFree((void *)address));
}

int mpidl_cuda_host_allocate(int device, int64_t nbytes, uintptr_t *address) {
    ON_DEVICE(cudaHostAlloc((void **)address, (size_t)nbytes, cudaHostAllocPortable));
}

int mpidl_cuda_host_free(int device, uintptr_t address) {
    ON_DEVICE(cudaFreeHost((void *)address));
}

int mpidl_cuda_copy(int device, uintptr_t to, uintptr_t from, int64_t nbytes, uintptr_t stream) {
    ON_DEVICE(cudaMemcpyAsync((void *)to, (const void *)from, (size_t)nbytes, cudaMemcpyDefault, (cudaStream_t)stream));
}

int mpidl_cuda_clear(int device, uintptr_t address, int64_t nbytes, uintptr_t stream) {
    ON_DEVICE(cudaMemsetAsync((void *)address, 0, (size_t)nbytes, (cudaStream_t)stream));
}

int mpidl_cuda_stream_make(int device, uintptr_t *stream) {
    ON_DEVICE(cudaStreamCreateWithFlags((cudaStream_t *)stream, cudaStreamNonBlocking));
}

int mpidl_cuda_stream_free(int device, uintptr_t stream) {
    ON_DEVICE(cudaStreamDestroy((cudaStream_t)stream));
}

int mpidl_cuda_event_make(int device, uintptr_t *event) {
    ON_DEVICE(cudaEventCreateWithFlags((cudaEvent_t *)event, cudaEventDisableTiming));
}

int mpidl_cuda_event_free(int device, uintptr_t event) {
    ON_DEVICE(cudaEventDestroy((cudaEvent_t)event));
}

int mpidl_cuda_event_record(int device, uintptr_t event, uintptr_t stream) {
    ON_DEVICE(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream));
}

int mpidl_cuda_stream_wait(int device, uintptr_t stream, uintptr_t event) {
    ON_DEVICE(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0));
}

int mpidl_cuda_event_wait(int device, uintptr_t event) {
    ON_DEVICE(cudaEventSynchronize((cudaEvent_t)event));
}

/* An event that is not done yet is no error. */
static cudaError_t asked(cudaEvent_t event, int *done) {
    cudaError_t error = cudaEventQuery(event);
    *done = error == cudaSuccess;
    return error == cudaErrorNotReady ? cudaSuccess : error;
}

int mpidl_cuda_event_done(int device, uintptr_t event, int *done) {
    ON_DEVICE(asked((cudaEvent_t)event, done));
}

const char *mpidl_cuda_describe(int status) {
    return cudaGetErrorString((cudaError_t)(status - MPIDL_CUDA_ERROR));
}

int mpidl_cuda_interface(void) {
    return MPIDL_CUDA_INTERFACE;
}
