// A block of GPU threads on the CPU, so that kernels' own code is tested where there is no GPU. Each thread is a fiber,
// which runs until it has to wait for others; whose turn it is next is drawn at random. What a GPU does behind its
// threads' backs happens as early or as late as it may: copies into shared memory at once, bulk stores when they are
// waited for, products at either time, drawn for each. So what is read too early or written over too soon spoils
// results here, too. Speed, and what only caches or the weak order of memory show, is not there.
#pragma once

#include <math.h>  // for the global namespace, as in CUDA

#include <algorithm>
#include <cstdint>
#include <functional>

// What the kernels call by these names.
#define threadIdx (::convt3d::emulation::thread_index)
#define blockIdx (::convt3d::emulation::block_index)
#define gridDim (::convt3d::emulation::grid_extent)
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace convt3d::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index, grid_extent;

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
bool any_of_warp(bool condition);

// What the lanes of this thread's warp have put here, a row of words each.
using LaneWords = uint32_t[32][4];
LaneWords& words_of_warp();

// Barriers in shared memory that count arrivals and bytes.
void make_barrier(uint32_t address, int arrivals);
void arrive(uint32_t address);
void add_bytes(uint32_t address, int64_t bytes);
void wait(uint32_t address, uint32_t parity);

// Things that happen behind this thread's back, in groups; all but the last `pending` groups are done on return.
enum class Unit { products, bulk_stores };
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
inline int __any_sync(unsigned, int condition) { return convt3d::emulation::any_of_warp(condition != 0) ? 1 : 0; }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
float __uint_as_float(uint32_t bits);
uint32_t __float_as_uint(float value);
uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector);
