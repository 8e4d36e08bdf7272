// Every kernel is launched here, with its status checked.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"

namespace convt3d {

// When a kernel begins: in turn, once all before it on the stream has ended, or early, while the kernel before it may
// still run. One that begins early calls ptx::wait_for_previous_kernel() before it touches what that kernel writes, and
// does so in every block, so that it cannot end first. Only compute capability 9.0 and later has that.
enum class Begins { in_turn, early };

// Runs `kernel` on `grid` blocks of `threads` with `shared_bytes` of dynamic shared memory, which may exceed 48 KiB.
template <class... Parameters, class... Arguments>
void launch(Begins begins, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  configuration.attrs = &early;
  configuration.numAttrs = begins == Begins::early ? 1 : 0;
  cudaLaunchKernelEx(&configuration, kernel, arguments...);
  check_cuda(cudaGetLastError(), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  launch(Begins::in_turn, name, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace convt3d
