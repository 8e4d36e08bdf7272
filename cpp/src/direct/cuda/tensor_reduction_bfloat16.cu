// One type to a file, so that they compile side by side.
#include "direct/cuda/tensor_reduction.h"

namespace convt3d::direct {

template void reduce_tensor(const Problem&, const TensorReduction&, const __nv_bfloat16*, const __nv_bfloat16*, float*,
                            __nv_bfloat16*, cudaStream_t);

}  // namespace convt3d::direct
