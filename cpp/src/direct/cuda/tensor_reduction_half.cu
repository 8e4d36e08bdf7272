// One type to a file, so that they compile side by side.
#include "direct/cuda/tensor_reduction.h"

namespace convt3d::direct {

template void reduce_tensor(const Problem&, const TensorReduction&, const __half*, const __half*, float*, __half*,
                            cudaStream_t);

}  // namespace convt3d::direct
