// In place of the sources' file of this name: kernels run on the CPU, one after the other.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "emulation/block.h"

namespace convt3d {

enum class Begins { in_turn, early };

template <class... Parameters, class... Arguments>
void launch(Begins, const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t, const Arguments&... arguments) {
  emulation::run({grid.x, grid.y, grid.z}, threads, shared_bytes, [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  launch(Begins::in_turn, name, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace convt3d
