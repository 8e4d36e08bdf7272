// One type to a file, so that they compile side by side.
#include "direct/cuda/pipelined_gather.h"

namespace convt3d::direct {

template void gather_pipelined(const Problem&, Operator, const PipelinedGather&, const __half*, const __half*,
                               const __half*, __half*, void*, cudaStream_t);

}  // namespace convt3d::direct
