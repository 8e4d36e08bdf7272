#include "gemm/cuda/cublas.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>
#include <vector>

#include "cuda/check.h"

namespace convt3d::gemm {
namespace {

#ifdef CONVT3D_CUBLAS_FALLBACK
constexpr const char* kFallback = CONVT3D_CUBLAS_FALLBACK;  // where the build found it
#else
constexpr const char* kFallback = "";
#endif

void* open_library(std::string& name) {
  const char* const names[] = {"libcublas.so.13", "libcublas.so.12"};
  // First a copy that is loaded already, whichever it is; only then one from the search path.
  for (const int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {
    for (const char* candidate : names) {
      if (void* library = dlopen(candidate, flags)) {
        name = candidate;
        return library;
      }
    }
  }
  name = kFallback;
  return *kFallback == '\0' ? nullptr : dlopen(kFallback, RTLD_LAZY);
}

template <class Function>
void resolve(CublasLibrary& library, void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  if (function == nullptr) {
    library.missing = library.name + " lacks " + symbol + "; cuBLAS 12.4 or later is needed";
  }
}

CublasLibrary bind() {
  CublasLibrary library;
  void* handle = open_library(library.name);
  if (handle == nullptr) {
    library.name.clear();
    library.missing = "no libcublas.so.13 or libcublas.so.12 is loaded or on the library path";
    return library;
  }
  resolve(library, handle, "cublasCreate_v2", library.create);
  resolve(library, handle, "cublasSetStream_v2", library.set_stream);
  resolve(library, handle, "cublasSetWorkspace_v2", library.set_workspace);
  resolve(library, handle, "cublasSetMathMode", library.set_math_mode);
  resolve(library, handle, "cublasGetProperty", library.get_property);
  resolve(library, handle, "cublasGetStatusString", library.status_string);
  resolve(library, handle, "cublasGemmStridedBatchedEx_64", library.gemm_strided_batched);
  resolve(library, handle, "cublasGemmEx_64", library.gemm);
  if (!library.missing.empty()) library.name.clear();
  return library;
}

cublasHandle_t create_handle(const CublasLibrary& library) {
  // Creation allocates, which a capture in progress on another stream must not see as its own.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cublasHandle_t handle = nullptr;
  const cublasStatus_t status = library.create(&handle);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  library.check(status, "cublasCreate");
  // Half types add up in float32 even where cuBLAS splits the reduction.
  library.check(
      library.set_math_mode(
          handle, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)),
      "cublasSetMathMode");
  return handle;
}

// Handles that no thread holds. They are never destroyed: at exit the driver may be gone before them.
class HandlePool {
 public:
  static HandlePool& instance() {
    static HandlePool* pool = new HandlePool;
    return *pool;
  }
  cublasHandle_t take(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (static_cast<size_t>(device) >= idle_.size() || idle_[device].empty()) return nullptr;
    cublasHandle_t handle = idle_[device].back();
    idle_[device].pop_back();
    return handle;
  }
  void give_back(int device, cublasHandle_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (static_cast<size_t>(device) >= idle_.size()) idle_.resize(device + 1);
    idle_[device].push_back(handle);
  }

 private:
  std::mutex mutex_;
  std::vector<std::vector<cublasHandle_t>> idle_;
};

// A handle, with the stream and workspace that were last set on it: most calls find them as they need them.
struct BoundHandle {
  cublasHandle_t handle = nullptr;
  bool bound = false;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;

  void bind(const CublasLibrary& library, cudaStream_t new_stream, void* new_workspace, int64_t new_bytes) {
    const bool same_stream = bound && stream == new_stream;
    if (same_stream && workspace == new_workspace && workspace_bytes == new_bytes) return;
    bound = false;
    // Setting the stream resets the workspace, so the order matters.
    if (!same_stream) library.check(library.set_stream(handle, new_stream), "cublasSetStream");
    library.check(library.set_workspace(handle, new_workspace, static_cast<size_t>(new_bytes)), "cublasSetWorkspace");
    bound = true;
    stream = new_stream;
    workspace = new_workspace;
    workspace_bytes = new_bytes;
  }
};

// The handles of one host thread, given back when it ends.
struct ThreadHandles {
  std::vector<BoundHandle> by_device;

  BoundHandle& get(int device, const CublasLibrary& library) {
    if (static_cast<size_t>(device) >= by_device.size()) by_device.resize(device + 1);
    BoundHandle& bound = by_device[device];
    if (bound.handle == nullptr) bound.handle = HandlePool::instance().take(device);
    if (bound.handle == nullptr) bound.handle = create_handle(library);
    return bound;
  }
  ~ThreadHandles() {
    for (size_t device = 0; device < by_device.size(); ++device) {
      cublasHandle_t handle = by_device[device].handle;
      if (handle != nullptr) HandlePool::instance().give_back(static_cast<int>(device), handle);
    }
  }
};

}  // namespace

const CublasLibrary& CublasLibrary::instance() {
  static const CublasLibrary library = bind();
  return library;
}

std::string CublasLibrary::description() const {
  if (name.empty()) return "";
  int major = 0, minor = 0, patch = 0;
  get_property(MAJOR_VERSION, &major);
  get_property(MINOR_VERSION, &minor);
  get_property(PATCH_LEVEL, &patch);
  return name + " (" + std::to_string(major) + '.' + std::to_string(minor) + '.' + std::to_string(patch) + ')';
}

void CublasLibrary::check(cublasStatus_t status, const char* what) const {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(what) + " failed: " + status_string(status));
  }
}

cublasHandle_t cublas_handle(int device, cudaStream_t stream, void* workspace, int64_t workspace_bytes) {
  const CublasLibrary& library = CublasLibrary::instance();
  if (library.name.empty()) throw std::runtime_error("cuBLAS is not available: " + library.missing);
  thread_local ThreadHandles handles;
  BoundHandle& bound = handles.get(device, library);
  bound.bind(library, stream, workspace, workspace_bytes);
  return bound.handle;
}

void cublas_gemm(cublasHandle_t handle, const Gemm& gemm, const CublasTypes& types, const void* a, const void* b,
                 void* c) {
  const CublasLibrary& library = CublasLibrary::instance();
  const bool wide = types.compute == CUBLAS_COMPUTE_64F;
  const double one_double = 1.0, beta_double = gemm.accumulate ? 1.0 : 0.0;
  const float one_float = 1.0f, beta_float = gemm.accumulate ? 1.0f : 0.0f;
  const void* alpha = wide ? static_cast<const void*>(&one_double) : &one_float;
  const void* beta = wide ? static_cast<const void*>(&beta_double) : &beta_float;
  // cuBLAS is column-major, where every matrix here is its transpose: C^T = op(B)^T op(A)^T.
  const cublasOperation_t op_a = gemm.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = gemm.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  if (gemm.batch == 1) {
    library.check(
        library.gemm(handle, op_b, op_a, gemm.n, gemm.m, gemm.k, alpha, b, types.operand, gemm.ldb, a, types.operand,
                     gemm.lda, beta, c, types.result, gemm.ldc, types.compute, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
  } else {
    library.check(
        library.gemm_strided_batched(handle, op_b, op_a, gemm.n, gemm.m, gemm.k, alpha, b, types.operand, gemm.ldb,
                                     gemm.stride_b, a, types.operand, gemm.lda, gemm.stride_a, beta, c, types.result,
                                     gemm.ldc, gemm.stride_c, gemm.batch, types.compute, CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
  }
}

}  // namespace convt3d::gemm
