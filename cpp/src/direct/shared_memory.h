// What is left of a multiprocessor's shared memory for the blocks that are to share it.
#pragma once

#include <cstdint>

#include "convt3d/convt3d.h"

namespace convt3d::direct {

constexpr int64_t kReservedShared = 1024;  // bytes that the driver keeps for each block

inline int64_t shared_memory_of_block(const Target& target, int64_t blocks) {
  return target.shared_memory / blocks - kReservedShared;
}
inline int64_t blocks_that_share(const Target& target, int64_t block_bytes) {
  return target.shared_memory / (block_bytes + kReservedShared);
}

}  // namespace convt3d::direct
