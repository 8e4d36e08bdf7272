// One batched matrix product, as both backends take it.
#pragma once

#include <cstdint>

namespace convt3d::gemm {

// Row-major C[b] (m x n) = op(A[b]) (m x k) @ op(B[b]) (k x n), added to C[b] if `accumulate`. Strides are in elements.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false, transpose_b = false;
  bool accumulate = false;
  int64_t lda = 0, ldb = 0, ldc = 0;
  int64_t batch = 1;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0;
};

// A level of batching around a Gemm: how far each matrix moves from one member to the next.
struct BatchLevel {
  int64_t count = 1;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0;
};

// Whether the members of `outer` follow on from those of `inner`, so that the two levels are one.
inline bool nests(const BatchLevel& outer, const BatchLevel& inner) {
  return inner.stride_c != 0 && outer.stride_a == inner.count * inner.stride_a &&
         outer.stride_b == inner.count * inner.stride_b && outer.stride_c == inner.count * inner.stride_c;
}

// Runs `gemm` over both levels: as one strided batch where they nest, else the longer one as a strided batch and the
// shorter one as a loop. A level whose members share one C adds up in it: such a level must be the loop, and
// `gemm.accumulate` then speaks of the first member only.
template <class Backend, class Operand, class Result>
void run_batches(const Backend& backend, Gemm gemm, BatchLevel first, BatchLevel second, const Operand* a,
                 const Operand* b, Result* c) {
  if (nests(first, second)) {
    second.count *= first.count;
    first = BatchLevel{};
  }
  const bool first_sums = first.count > 1 && first.stride_c == 0;
  const bool second_sums = second.count > 1 && second.stride_c == 0;
  const bool batch_first = !first_sums && (second_sums || first.count >= second.count);
  const BatchLevel& batched = batch_first ? first : second;
  const BatchLevel& looped = batch_first ? second : first;
  gemm.batch = batched.count;
  gemm.stride_a = batched.stride_a;
  gemm.stride_b = batched.stride_b;
  gemm.stride_c = batched.stride_c;
  for (int64_t member = 0; member < looped.count; ++member) {
    backend.gemm(gemm, a + member * looped.stride_a, b + member * looped.stride_b, c + member * looped.stride_c);
    if (looped.stride_c == 0) gemm.accumulate = true;
  }
}

}  // namespace convt3d::gemm
