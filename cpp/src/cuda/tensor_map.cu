#include "cuda/tensor_map.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace convt3d {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, which nothing here is linked with; null where it has none.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

std::optional<CUtensorMap> map_of_boxes(const float* base, const std::array<int64_t, 5>& sizes,
                                        const std::array<int64_t, 4>& strides, const std::array<int, 5>& box) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return std::nullopt;
  cuuint64_t extents[5], pitches[4];
  cuuint32_t box_extents[5], steps[5];
  std::copy(sizes.begin(), sizes.end(), extents);
  std::transform(strides.begin(), strides.end(), pitches,
                 [](int64_t stride) { return static_cast<cuuint64_t>(stride) * sizeof(float); });
  std::copy(box.begin(), box.end(), box_extents);
  std::fill_n(steps, 5, 1);
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 5, const_cast<float*>(base), extents, pitches,
                                 box_extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? std::optional(map) : std::nullopt;
}

}  // namespace convt3d
