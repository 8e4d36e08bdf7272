// What a warp's threads do together, and copies between memories, for emulated blocks (see block.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace convt3d::emulation {

uint32_t word_at(uint32_t address);
uint32_t or_of_warp(uint32_t bits);
float round_to_tf32(float value);  // nearest, ties away from zero

// Four matrices of 8 rows by 16 bytes; lane l names row l % 8 of matrix l / 8, and has of each row l / 4 two half
// types from 2 * (l % 4) on, or of a transposed one two rows of column l / 4.
template <int Count>
void load_matrices(uint32_t (&words)[Count], uint32_t row, bool transposed);  // four, or the first two
void store_matrices(uint32_t row, const uint32_t (&words)[4], bool transposed);

// One warp's share of wgmma: sums += a @ b, or without `keeps` = a @ b, of 16 rows of a in registers by so many columns
// of b, which its descriptor says; or of rows of a that are in shared memory, too. Floats count as TF32.
template <class T>
void multiply(const uint32_t* a, uint64_t b, int columns, float* sums, bool keeps);
template <class T>
void multiply_shared(uint64_t a, uint64_t b, int columns, float* sums);

// The same at once, by mma, of eight columns in registers.
template <class T>
void multiply_columns(const uint32_t* a, const uint32_t* b, float* sums);
// And with rows of b as the inner index, see ptx::WgmmaTransposed.
template <class T>
void multiply_transposed(const uint32_t* a, uint64_t b, int columns, float* sums);

int32_t sum_of_warp(int32_t value);

void copy_bulk(uint32_t shared, const void* global, uint32_t bytes);
void store_bulk(void* global, uint32_t shared, uint32_t bytes);  // begins; what is stored is read when it is waited for
void copy_async(uint32_t shared, const void* global, uint32_t bytes, bool valid);  // begins, or zeros
int64_t copy_box(uint32_t shared, const void* map, const int (&at)[5]);            // returns the bytes of a box

}  // namespace convt3d::emulation

// What CUDA's headers have for device code alone, of half types.
template <class Pair>
Pair __hfma2(Pair a, Pair b, Pair c) {
  Pair sum;
  sum.x = static_cast<float>(a.x) * static_cast<float>(b.x) + static_cast<float>(c.x);
  sum.y = static_cast<float>(a.y) * static_cast<float>(b.y) + static_cast<float>(c.y);
  return sum;
}
