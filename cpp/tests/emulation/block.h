// A block of GPU threads on the CPU, so that kernels' own code is tested where there is no GPU. Each thread is a fiber,
// which runs until it has to wait for others; whose turn it is next is drawn at random. What a GPU does behind its
// threads' backs happens as early or as late as it may: bulk copies into shared memory at once, other copies and bulk
// stores when they are waited for, products at either time, drawn for each. So what is read too early or written over
// too soon spoils results here, too. Speed, and what only caches or the weak order of memory show, is not there.
#pragma once

#include <math.h>  // for the global namespace, as in CUDA

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

// What the kernels call by these names.
#define threadIdx (::convt3d::emulation::thread_index)
#define blockIdx (::convt3d::emulation::block_index)
#define blockDim (::convt3d::emulation::block_extent)
#define gridDim (::convt3d::emulation::grid_extent)
#undef __launch_bounds__
#define __launch_bounds__(...)
// One for all fibers, which one thread runs, also where it is declared in a function.
#undef __shared__
#define __shared__ thread_local

namespace convt3d::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, block_extent, grid_extent;

constexpr uint32_t kSharedBytes = 227 * 1024;

// Runs `kernel` as all threads of each block of a grid, one block after the other, which all find other things than
// zeros in shared memory. Throws if threads wait for each other forever, or leave something unfinished.
void run(const Index& grid, int threads, uint64_t shared_bytes, const std::function<void()>& kernel);

// Lets other threads run until the condition holds.
void wait_until(const std::function<bool()>& condition);

// Waits for the other threads of the warp, or for so many threads that come to a barrier of this number.
void synchronize_warp();
void synchronize_block();
void synchronize(int barrier, int threads);
void arrive(int barrier, int threads);  // does not wait

// What the lanes of this thread's warp have put here, a row of words each.
using LaneWords = uint32_t[32][8];
LaneWords& words_of_warp();

// Barriers in shared memory that count arrivals and bytes.
void make_barrier(uint32_t address, int arrivals);
void arrive(uint32_t address);
void add_bytes(uint32_t address, int64_t bytes);
bool has_ended(uint32_t address, uint32_t parity);
void wait(uint32_t address, uint32_t parity);

// Things that happen behind this thread's back, in groups; all but the last `pending` groups are done on return.
enum class Unit { products, bulk_stores, copies };
void begin(Unit unit, const std::function<void()>& work);
void commit(Unit unit);
void finish(Unit unit, int pending);

unsigned char* shared_memory();
unsigned char* shared_at(uint32_t address, uint32_t bytes);  // throws beyond what the kernel asked for

}  // namespace convt3d::emulation

// What CUDA's headers have for device code alone.
using std::max;
using std::min;
inline void __syncthreads() { convt3d::emulation::synchronize_block(); }
inline void __syncwarp() { convt3d::emulation::synchronize_warp(); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
unsigned __ballot_sync(unsigned, int condition);
inline int __any_sync(unsigned, int condition) { return __ballot_sync(~0u, condition) != 0 ? 1 : 0; }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(convt3d::emulation::LaneWords) / 32);
  auto& words = convt3d::emulation::words_of_warp();
  std::memcpy(words[threadIdx.x % 32], &value, sizeof value);
  __syncwarp();
  std::memcpy(&value, words[lane], sizeof value);
  __syncwarp();
  return value;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return __shfl_sync(mask, value, lane < lanes ? lane : lane - lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return __shfl_sync(mask, value, lane + lanes < 32 ? lane + lanes : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) % 32 ^ bits);
}
float __uint_as_float(uint32_t bits);
uint32_t __float_as_uint(float value);
uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector);
uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits);
