/* The caller's current device, kept as it was: torch and cupy have ideas of their own about it. */
#ifndef MPIDL_CUDA_MEMORY_H
#define MPIDL_CUDA_MEMORY_H

#include <cuda_runtime_api.h>

#include "include/mpidl_cuda.h"

static inline int mpidl_cuda_status(cudaError_t error) {
    return error == cudaSuccess ? MPIDL_OK : MPIDL_CUDA_ERROR + (int)error;
}

static inline cudaError_t mpidl_cuda_enter(int device, int *before) {
    *before = device;
    cudaError_t error = cudaGetDevice(before);
    return error == cudaSuccess && *before != device ? cudaSetDevice(device) : error;
}

/* Returns the status of what was done in between, or of going back. */
static inline int mpidl_cuda_leave(int device, int before, cudaError_t error) {
    if (before != device) {
        cudaError_t back = cudaSetDevice(before);
        error = error == cudaSuccess ? back : error;
    }
    if (error != cudaSuccess) {
        cudaGetLastError(); /* forgets it, where it can be forgotten: it has been told */
    }
    return mpidl_cuda_status(error);
}

#endif
