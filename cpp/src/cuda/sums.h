// Partial sums added up on a GPU, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "operands.h"

namespace convt3d {

// result[i] = partials[0][i] + partials[1][i] + ... of `count` arrays of `elements`.
template <class T>
void sum_partials(const Accumulator<T>* partials, int64_t count, int64_t elements, T* result, cudaStream_t stream,
                  Begins begins = Begins::in_turn);

}  // namespace convt3d
