// What is left of a multiprocessor's shared memory for the blocks that are to share it.
#pragma once

#include <cstdint>

#include "convt3d/convt3d.h"

namespace convt3d::direct {

inline int64_t shared_memory_of_block(const Target& target, int64_t blocks) {
  constexpr int64_t kReserved = 1024;  // the driver keeps so much for each block
  return target.shared_memory / blocks - kReserved;
}

}  // namespace convt3d::direct
