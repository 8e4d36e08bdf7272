// The parts of a plan's workspace, and where they begin.
#pragma once

#include "convt3d/convt3d.h"

namespace convt3d {

// Bytes rounded up so that whatever follows is aligned for every load.
inline int64_t align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// In bytes from the beginning. A plan has only some of the parts; the others are empty.
struct WorkspaceLayout {
  int64_t columns, weights, partials, conversion, library;

  explicit WorkspaceLayout(const Plan& plan)
      : columns(0),
        weights(columns + plan.column_bytes),
        partials(weights + plan.weight_bytes),
        conversion(partials + plan.partial_bytes),
        library(conversion + plan.conversion_bytes) {}
};

}  // namespace convt3d
