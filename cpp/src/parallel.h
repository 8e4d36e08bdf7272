// Loops over independent iterations on up to `threads` threads of OpenMP, where the build has it.
#pragma once

#include <cstdint>

namespace convt3d {

template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  (void)threads;
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace convt3d
