#include <sstream>
#include <stdexcept>

#include "convt3d/convt3d.h"
#ifdef CONVT3D_WITH_CPU
#include "gemm/cpu/cblas.h"
#endif
#ifdef CONVT3D_WITH_CUDA
#include "cuda/check.h"
#include "gemm/cuda/cublas.h"
#endif

namespace convt3d {

namespace {

void check_positive(const char* name, int value) {
  if (value <= 0) throw std::invalid_argument(std::string(name) + " must be positive, got " + std::to_string(value));
}

}  // namespace

Target Target::cuda(int device) {
#ifdef CONVT3D_WITH_CUDA
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "reading the device's attributes");
    return value;
  };
  int64_t capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  // What only code for 9.0a can do is not there in a build without it.
  if (capability == 90 && std::string(CONVT3D_CUDA_ARCHITECTURES).find("90a") == std::string::npos) capability = 89;
  return {Backend::cuda, attribute(cudaDevAttrMultiProcessorCount), capability,
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
#else
  (void)device;
  throw std::runtime_error(
      "this build of convt3d has no CUDA backend (" CONVT3D_CUDA_MISSING
      "); rebuild with nvcc on the PATH: CONVT3D_CUDA=ON pip install --force-reinstall convt3d-gemm");
#endif
}

Target Target::cpu(int threads) {
  check_positive("threads", threads);
  return {Backend::cpu, threads, 0, 0};
}

Target Target::cuda(int compute_capability, int multiprocessors, int shared_memory) {
  check_positive("compute_capability", compute_capability);
  check_positive("multiprocessors", multiprocessors);
  check_positive("shared_memory", shared_memory);
  return {Backend::cuda, multiprocessors, compute_capability, shared_memory};
}

BuildInfo build_info() {
  BuildInfo info;
  info.version = CONVT3D_VERSION;
#ifdef CONVT3D_WITH_CPU
  info.backends.push_back("cpu");
  info.cblas = gemm::cblas_description();
#endif
#ifdef _OPENMP
  info.openmp = true;
#endif
#ifdef CONVT3D_WITH_CUDA
  info.backends.push_back("cuda");
  info.cuda_version = CONVT3D_CUDA_VERSION;
  std::istringstream architectures(CONVT3D_CUDA_ARCHITECTURES);
  for (std::string name; architectures >> name;) info.cuda_architectures.push_back(name);
  info.cublas = gemm::CublasLibrary::instance().description();
#else
  info.cuda_missing = CONVT3D_CUDA_MISSING;
#endif
  return info;
}

}  // namespace convt3d
