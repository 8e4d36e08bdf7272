// Every kernel of the direct algorithm is launched here, with its status checked.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace convt3d {

// Runs `kernel` on `grid` blocks of `threads` with `shared_bytes` of dynamic shared memory, which may exceed 48 KiB.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace convt3d
