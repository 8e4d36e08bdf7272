// The direct kernels' entry points. Each launches on `stream` and returns; pointers are dense in the problem's layout.
#pragma once

#include <cuda_runtime.h>

#include "convt3d/problem.h"
#include "direct/schedule.h"
#include "operands.h"

namespace convt3d::direct {

// Forward (source is the input) or grad_input (source is grad_output; no bias), for every problem and type. With
// `only_if`, on the device, nothing is done where that points to a 0; the kernel then begins early, see cuda/launch.h.
template <class T>
void gather_simt(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                 cudaStream_t stream, const int* only_if = nullptr);

// `parts` partial sums of grad_weight, one weight-shaped array after the other.
template <class T>
void reduce_simt(const Problem& problem, int64_t parts, const T* grad_output, const T* input, Accumulator<T>* partials,
                 cudaStream_t stream);

// The same, where every group has one input and one output channel.
template <class T>
void gather_depthwise(const Problem& problem, Operator op, const Target& target, const T* source, const T* weight,
                      const T* bias, T* destination, cudaStream_t stream);
template <class T>
void reduce_depthwise(const Problem& problem, int64_t parts, const T* grad_output, const T* input,
                      Accumulator<T>* partials, cudaStream_t stream);

// The same on tensor cores, for float, __half and __nv_bfloat16, as cut by cut_tensor_gather, cut_pipelined_gather and
// cut_tensor_reduction.
// `packed` has room for gather.packed_bytes.
template <class T>
void gather_tensor(const Problem& problem, Operator op, const TensorGather& gather, const T* source, const T* weight,
                   const T* bias, T* destination, void* packed, cudaStream_t stream);
template <class T>
void gather_pipelined(const Problem& problem, Operator op, const PipelinedGather& gather, const T* source,
                      const T* weight, const T* bias, T* destination, void* packed, cudaStream_t stream);
// What the pipelined gather leaves out of a forward.
template <class T>
void fill_bare_rows(const Problem& problem, const PipelinedGather& gather, const T* bias, T* output,
                    cudaStream_t stream);
// If there is one part of the sums, they go to the result at once.
template <class T>
void reduce_tensor(const Problem& problem, const TensorReduction& reduction, const T* grad_output, const T* input,
                   float* partials, T* result, cudaStream_t stream);

}  // namespace convt3d::direct
