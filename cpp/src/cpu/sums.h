// Sums of partial results, in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace convt3d {

// result[i] = the sum over `count` arrays of `elements` each.
template <class T>
void sum_partials(const T* partials, int64_t count, int64_t elements, T* result, int threads) {
  constexpr int64_t kRun = 4096;
  parallel_for(threads, (elements + kRun - 1) / kRun, [&](int64_t run) {
    const int64_t begin = run * kRun, end = std::min(begin + kRun, elements);
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += partials[part * elements + i];
      result[i] = static_cast<T>(sum);
    }
  });
}

}  // namespace convt3d
