// The direct algorithm for every problem: vectors lie along height and width. Planes are taken apart into phases, and
// in NDHWC into channels, on the way to a tile in the cache, where everything is computed.
#pragma once

#include "convt3d/convt3d.h"

namespace convt3d::direct {

// Forward, from input to output, or grad_input, from grad_output to grad_input. `bias` may be null.
template <class T>
void gather_tiles(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                  int threads);

// grad_weight in `parts` partial sums, one weight tensor after the other.
template <class T>
void reduce_tiles(const Problem& problem, const T* grad_output, const T* input, int64_t parts, T* partials,
                  int threads);

}  // namespace convt3d::direct
