// What the copy engine of compute capability 9.0 has to know of a tensor in order to copy boxes of it, see
// ptx::copy_box.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <optional>

namespace convt3d {

// Of floats from `base` on, in elements, the innermost of five dimensions first: the tensor's sizes, from one index of
// each dimension but the innermost to the next, and the box's sizes. Nothing where that cannot be, as where the address
// or a stride is no multiple of 16 bytes, or where the driver is too old.
std::optional<CUtensorMap> map_of_boxes(const float* base, const std::array<int64_t, 5>& sizes,
                                        const std::array<int64_t, 4>& strides, const std::array<int, 5>& box);

}  // namespace convt3d
