// In place of the sources' file of this name: the instructions, as what they do to emulated threads. Those that tell a
// GPU how to be fast, or when writes become visible, do nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "emulation/block.h"
#include "emulation/warp.h"

#define CONVT3D_HAS_MMA 1
#define CONVT3D_HAS_WGMMA 1
#define CONVT3D_HAS_EARLY_LAUNCH 1
#define CONVT3D_DYNAMIC_SHARED(alignment, name) unsigned char* const name = ::convt3d::emulation::shared_memory()

namespace convt3d::ptx {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::shared_memory());
}
inline uint32_t load_shared(uint32_t address) { return emulation::word_at(address); }
template <int Offset>
uint32_t load_shared(uint32_t address) {
  return emulation::word_at(address + Offset);
}
template <class Value>
void store_shared_if(bool condition, uint32_t address, Value value) {
  if (condition) std::memcpy(emulation::shared_at(address, sizeof value), &value, sizeof value);
}
template <class Value>
void store_shared_if_any(uint32_t bits, uint32_t address, Value value) {
  store_shared_if(bits != 0, address, value);
}
template <class Value>
void store_global_if(bool condition, void* to, Value value) {
  if (condition) std::memcpy(to, &value, sizeof value);
}

template <int Count>
void load_matrices(uint32_t (&r)[Count], uint32_t row) {
  emulation::load_matrices(r, row, false);
}
template <int Count>
void load_matrices_transposed(uint32_t (&r)[Count], uint32_t row) {
  emulation::load_matrices(r, row, true);
}
inline void store_matrices(uint32_t row, const uint32_t (&r)[4]) { emulation::store_matrices(row, r, false); }
inline void store_matrices_transposed(uint32_t row, const uint32_t (&r)[4]) { emulation::store_matrices(row, r, true); }

inline uint32_t or_of_warp(uint32_t bits) { return emulation::or_of_warp(bits); }
inline int32_t sum_of_warp(int32_t value) { return emulation::sum_of_warp(value); }
template <class T>
T opaque(T value) {
  return value;
}

template <class T>
T* opaque_global(T* pointer) {
  return pointer;
}

inline float round_to_tf32(float value) { return emulation::round_to_tf32(value); }
inline uint32_t rounded_for_tf32(uint32_t bits) { return __float_as_uint(round_to_tf32(__uint_as_float(bits))); }
inline uint32_t nearly_rounded_for_tf32(uint32_t bits) {
  return __float_as_uint(__uint_as_float(bits) * (1.0f + 0.7213f / 2048));
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_columns<T>(a, b, d);
}

inline void copy_async(uint32_t shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
template <class T>
void copy_element(T* shared, const T* global, bool valid) {
  emulation::copy_async(shared_address(shared), global, sizeof(T), valid);
}
template <class T>
void copy_vector(T* shared, const T* global, bool valid) {
  emulation::copy_async(shared_address(shared), global, 16, valid);
}
inline void commit_copies() { emulation::commit(emulation::Unit::copies); }
template <int Pending>
void wait_for_copies() {
  emulation::finish(emulation::Unit::copies, Pending);
}
inline void wait_for_all_copies() {
  commit_copies();
  wait_for_copies<0>();
}

inline void barrier_sync(int id, int threads) { emulation::synchronize(id, threads); }
inline void barrier_arrive(int id, int threads) { emulation::arrive(id, threads); }
inline void make_barrier(uint32_t barrier, int arrivals) { emulation::make_barrier(barrier, arrivals); }
inline void arrive(uint32_t barrier) { emulation::arrive(barrier); }
inline void arrive_announcing(uint32_t barrier, uint32_t bytes) {
  emulation::add_bytes(barrier, bytes);
  emulation::arrive(barrier);
}
inline void wait(uint32_t barrier, uint32_t parity) { emulation::wait(barrier, parity); }
inline bool has_ended(uint32_t barrier, uint32_t parity) { return emulation::has_ended(barrier, parity); }

inline void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  emulation::copy_bulk(shared, global, bytes);
  emulation::add_bytes(barrier, -int64_t{bytes});
}
inline void copy_box(uint32_t shared, const void* map, const int (&at)[5], uint32_t barrier) {
  emulation::add_bytes(barrier, -emulation::copy_box(shared, map, at));
}
inline void store_bulk(void* global, uint32_t shared, uint32_t bytes) { emulation::store_bulk(global, shared, bytes); }
inline void commit_bulk_stores() { emulation::commit(emulation::Unit::bulk_stores); }
template <int Pending>
void wait_for_bulk_stores() {
  emulation::finish(emulation::Unit::bulk_stores, Pending);
}

inline void begin_products() {}
inline void commit_products() { emulation::commit(emulation::Unit::products); }
template <int Pending>
void wait_for_products() {
  emulation::finish(emulation::Unit::products, Pending);
}

inline uint32_t wgmma_columns(uint32_t address, uint32_t half_stride) { return address >> 4 | half_stride >> 4 << 16; }
inline uint64_t wgmma_descriptor(uint32_t columns, uint32_t stride = 8) {
  return static_cast<uint64_t>(stride) << 32 | columns;
}

// The registers of a and d are looked at when the product is made.
template <class T, int N>
struct Wgmma {
  static void run(float* d, const uint32_t (&a)[4], uint64_t b) { run_if(true, d, a, b); }
  static void run(float* d, uint64_t a, uint64_t b) {
    emulation::begin(emulation::Unit::products, [=] { emulation::multiply_shared<T>(a, b, N, d); });
  }
  static void run_if(bool keeps, float* d, const uint32_t (&a)[4], uint64_t b) {
    const uint32_t* registers = a;
    emulation::begin(emulation::Unit::products, [=] { emulation::multiply<T>(registers, b, N, d, keeps); });
  }
};

inline uint64_t wgmma_rows(uint32_t address, uint32_t half_stride, uint32_t column_stride) {
  return static_cast<uint64_t>(column_stride >> 4) << 32 | wgmma_columns(address, half_stride);
}
template <class T, int N>
struct WgmmaTransposed {
  static void run(float* d, const uint32_t (&a)[4], uint64_t b) {
    const uint32_t* registers = a;
    emulation::begin(emulation::Unit::products, [=] { emulation::multiply_transposed<T>(registers, b, N, d); });
  }
};

inline void fence_shared_for_wgmma() {}
inline void fence_global_for_bulk_copies() {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_begin() {}
template <int Registers>
void give_up_registers() {}
template <int Registers>
void claim_registers() {}

}  // namespace convt3d::ptx
