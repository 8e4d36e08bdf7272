// The CBLAS that the build found, under one overloaded name.
//
// CONVT3D_BLAS_PREFIX is scipy_ where it is the scipy-openblas32 package, whose symbols carry that prefix.
#pragma once

#include <cblas.h>

#include <mutex>
#include <string>

#ifndef CONVT3D_BLAS_PREFIX
#define CONVT3D_BLAS_PREFIX
#endif
#define CONVT3D_JOIN_(prefix, name) prefix##name
#define CONVT3D_JOIN(prefix, name) CONVT3D_JOIN_(prefix, name)
#define CONVT3D_BLAS(name) CONVT3D_JOIN(CONVT3D_BLAS_PREFIX, name)

namespace convt3d::gemm {

// OpenBLAS keeps one buffer per calling thread, for at most this many in scipy-openblas32's build.
constexpr int kBlasCallers = 64;

inline void cblas_gemm(CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int m, int n, int k, float alpha,
                       const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  CONVT3D_BLAS(cblas_sgemm)(CblasRowMajor, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

inline void cblas_gemm(CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, int m, int n, int k, double alpha,
                       const double* a, int lda, const double* b, int ldb, double beta, double* c, int ldc) {
  CONVT3D_BLAS(cblas_dgemm)(CblasRowMajor, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// While one lives, OpenBLAS starts no threads of its own, whose number the whole process shares: the first of several
// callers sets it, and the last one sets it back. Other libraries are called from within a parallel region, where those
// built on OpenMP keep to one thread anyway.
class SingleThreadedBlas {
 public:
#ifdef CONVT3D_OPENBLAS
  SingleThreadedBlas() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (living_++ > 0) return;
    threads_ = CONVT3D_BLAS(openblas_get_num_threads)();
    if (threads_ != 1) CONVT3D_BLAS(openblas_set_num_threads)(1);
  }
  ~SingleThreadedBlas() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--living_ == 0 && threads_ != 1) CONVT3D_BLAS(openblas_set_num_threads)(threads_);
  }

 private:
  inline static std::mutex mutex_;
  inline static int living_ = 0, threads_ = 1;
#else
  SingleThreadedBlas() {}
  ~SingleThreadedBlas() {}
#endif

 public:
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;
};

inline std::string cblas_description() {
#ifdef CONVT3D_OPENBLAS
  return CONVT3D_BLAS(openblas_get_config)();
#else
  return "CBLAS";
#endif
}

}  // namespace convt3d::gemm
