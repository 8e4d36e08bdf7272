// The GEMM path's steps on a CPU: CBLAS products and threaded loops, in float32 and float64.
#pragma once

#include <cstring>

#include "gemm/columns.h"
#include "gemm/gemm.h"
#include "geometry.h"

namespace convt3d::gemm {

class CpuBackend {
 public:
  explicit CpuBackend(int threads) : threads_(threads) {}

  template <class T>
  void gemm(const Gemm& gemm, const T* a, const T* b, T* c) const;

  template <class T>
  void col2vol(const Problem& problem, const ColumnBlock& block, Range<int64_t> planes, const T* columns, const T* bias,
               T* output) const;

  template <class T>
  void vol2col(const Problem& problem, const ColumnBlock& block, const T* volume, T* columns) const;

  template <class T>
  void fill_bias(const Problem& problem, const T* bias, T* volume) const;

  template <class T>
  void sum_partials(const T* partials, int64_t count, int64_t elements, T* result) const;

  template <class T>
  void bias_partials(const Problem& problem, int64_t count, const T* volume, T* partials) const;

  void clear(void* pointer, int64_t bytes) const { std::memset(pointer, 0, static_cast<size_t>(bytes)); }

 private:
  int threads_;
};

}  // namespace convt3d::gemm
