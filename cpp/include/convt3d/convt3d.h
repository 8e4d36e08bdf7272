// The transposed 3-D convolution and its gradients, over raw pointers.
//
//   Problem problem = ...; problem.validate();
//   Plan plan = make_plan(problem, Operator::forward, Target::cpu(threads), workspace_limit);
//   forward(plan, input, weight, bias, output, workspace /* plan.workspace_bytes */, execution);
//
// Nothing here allocates device memory or synchronises; all work goes to the given stream, and may be captured.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "convt3d/problem.h"

namespace convt3d {

enum class Operator { forward, grad_input, grad_weight, grad_input_weight, grad_bias };

// gemm: a matrix product makes columns, which col2vol sums (forward), or takes those that vol2col made (gradients).
// direct: straight from the tensors, without columns.
enum class Algorithm { gemm, direct };

enum class Backend { cpu, cuda };

// Where a plan is going to run, and how many workers it should keep busy there.
struct Target {
  Backend backend = Backend::cpu;
  int64_t parallelism = 1;         // CPU: threads; CUDA: multiprocessors
  int64_t compute_capability = 0;  // CUDA: 90 for 9.0
  int64_t shared_memory = 0;       // CUDA: bytes of a multiprocessor, for all its blocks

  static Target cpu(int threads);  // throws std::invalid_argument unless positive
  static Target cuda(int device);  // throws std::runtime_error without a CUDA backend or device
  // A GPU that need not be there, to plan for; throws std::invalid_argument unless all are positive.
  static Target cuda(int compute_capability, int multiprocessors, int shared_memory);
};

namespace direct {
struct Schedule;
}

// How one operator of one problem is computed: which kernels, and in which pieces, so that the workspace suffices.
struct Plan {
  Problem problem;
  Operator op = Operator::forward;
  Target target;
  Algorithm algorithm = Algorithm::gemm;

  // Algorithm gemm. Extents are the largest of their kind: the last piece may be smaller.
  DataType column_dtype = DataType::float32;
  int64_t samples = 1;        // samples whose columns are held at once
  int64_t channels = 1;       // output channels held at once: whole groups, or a part of one group (forward only)
  int64_t output_planes = 1;  // output depth planes made at once (forward only)
  int64_t voxels = 1;         // input voxels per sample whose columns are held at once
  int64_t splits = 1;         // equal parts of `voxels` that grad_weight reduces side by side
  int64_t reduction = 0;      // the longest sum that grad_weight leaves to one product

  // Algorithm direct.
  std::shared_ptr<const direct::Schedule> schedule;
  std::string configuration;   // the kernels: of each the family, and which one of it where it has several
  double expected_cycles = 0;  // of a multiprocessor's clock, for all of it; 0 where a family has no model of them

  int64_t partials = 0;  // partial sums of grad_weight or grad_bias, held in the accumulation type

  int64_t column_bytes = 0;
  int64_t partial_bytes = 0;
  int64_t weight_bytes = 0;      // weights packed in the order in which a direct kernel takes them
  int64_t conversion_bytes = 0;  // operands widened to float32 (half types on the CPU)
  int64_t library_bytes = 0;     // cuBLAS's own workspace, which the limit does not count
  int64_t workspace_bytes = 0;   // all of the above: what the caller allocates, aligned to 256 bytes
  bool fits = true;              // false where even the smallest pieces exceed the limit
};

// Chooses the kernels of `algorithm` for `op`, and cuts the work into pieces whose columns and partial sums take at
// most `workspace_limit` bytes, if that can be.
Plan make_plan(const Problem& problem, Operator op, const Target& target, int64_t workspace_limit,
               Algorithm algorithm = Algorithm::gemm);

// The device and stream (a cudaStream_t) that CUDA work goes to, and the threads that CPU work may use.
struct Execution {
  int device = 0;
  void* stream = nullptr;
  int threads = 1;
};

// All pointers are dense in the problem's layout. bias may be null. Each function takes a plan made for it.
void forward(const Plan& plan, const void* input, const void* weight, const void* bias, void* output, void* workspace,
             const Execution& execution);
void grad_input(const Plan& plan, const void* grad_output, const void* weight, void* grad_input, void* workspace,
                const Execution& execution);
void grad_weight(const Plan& plan, const void* grad_output, const void* input, void* grad_weight, void* workspace,
                 const Execution& execution);
// Both gradients; with Algorithm::gemm from one vol2col per chunk.
void grad_input_weight(const Plan& plan, const void* grad_output, const void* input, const void* weight,
                       void* grad_input, void* grad_weight, void* workspace, const Execution& execution);
void grad_bias(const Plan& plan, const void* grad_output, void* grad_bias, void* workspace, const Execution& execution);

// What this library was built with, and what it found at run time.
struct BuildInfo {
  std::string version;
  std::vector<std::string> backends;  // "cpu", "cuda"
  std::string cblas;                  // the CBLAS behind the CPU backend, empty without one
  bool openmp = false;
  std::string cuda_version;  // of the toolkit, empty without a CUDA backend
  std::vector<std::string> cuda_architectures;
  std::string cuda_missing;  // why there is no CUDA backend, empty with one
  std::string cublas;        // library and version bound at run time; empty if none could be bound
};
BuildInfo build_info();

}  // namespace convt3d
