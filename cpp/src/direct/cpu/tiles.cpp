#include "direct/cpu/tiles.h"

#include <vector>

#include "direct/cpu/instruction_sets.h"
#include "direct/cpu/traversal.h"
#include "operands.h"
#include "parallel.h"

namespace convt3d::direct {
namespace {

// Bytes of a tile's sums, of the source tiles that are loaded for them, of those that are worth keeping for the next
// plane, and of grad_weight's sums: all of it stays in the second cache.
constexpr int64_t kSumBytes = 64 << 10, kHeldBytes = 64 << 10, kKeptBytes = 256 << 10, kReductionBytes = 96 << 10;

// Positions of a line that a tile has at most.
constexpr int64_t kLongestRun = 512;

// Rounding errors grow with the length of a sum, so long ones are made of shorter ones. Forward and grad_input add up
// about this many products. grad_weight adds up the products of this many vectors, so many of such sums, and these in
// double.
constexpr int64_t kLongestSum = 64, kLongestDot = 256, kDots = 32;

// Taps that meet one phase of a destination plane, `count` of them in equal steps: where the first finds its source
// within a loaded tile, and its weight.
struct TapRun {
  int64_t source, weight, count;
};

namespace baseline {
constexpr int64_t kVectorBytes = 16;
#include "direct/cpu/vectors.inc"

#include "direct/cpu/tile_loops.inc"
}  // namespace baseline

#ifdef CONVT3D_WITH_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int64_t kVectorBytes = 32;
#include "direct/cpu/vectors.inc"

#include "direct/cpu/tile_loops.inc"
}  // namespace avx2
#pragma GCC pop_options
#endif

}  // namespace

template <class T>
void gather_tiles(const Problem& problem, Operator op, const T* source, const T* weight, const T* bias, T* destination,
                  int threads) {
  const bool is_forward = op == Operator::forward;
#ifdef CONVT3D_WITH_AVX2
  if (has_avx2()) return avx2::gather_all(problem, is_forward, source, weight, bias, destination, threads);
#endif
  baseline::gather_all(problem, is_forward, source, weight, bias, destination, threads);
}

template <class T>
void reduce_tiles(const Problem& problem, const T* grad_output, const T* input, int64_t parts, T* partials,
                  int threads) {
#ifdef CONVT3D_WITH_AVX2
  if (has_avx2()) return avx2::reduce_all(problem, grad_output, input, parts, partials, threads);
#endif
  baseline::reduce_all(problem, grad_output, input, parts, partials, threads);
}

template void gather_tiles(const Problem&, Operator, const float*, const float*, const float*, float*, int);
template void gather_tiles(const Problem&, Operator, const double*, const double*, const double*, double*, int);
template void reduce_tiles(const Problem&, const float*, const float*, int64_t, float*, int);
template void reduce_tiles(const Problem&, const double*, const double*, int64_t, double*, int);

}  // namespace convt3d::direct
