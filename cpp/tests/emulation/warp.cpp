#include "emulation/warp.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/tensor_map.h"
#include "emulation/block.h"

namespace convt3d {
namespace {

// What an emulated CUtensorMap holds.
struct Boxes {
  const float* base;
  int64_t sizes[5], strides[4];
  int32_t box[5];
};
static_assert(sizeof(Boxes) <= sizeof(CUtensorMap));

}  // namespace

std::optional<CUtensorMap> map_of_boxes(const float* base, const std::array<int64_t, 5>& sizes,
                                        const std::array<int64_t, 4>& strides, const std::array<int, 5>& box) {
  Boxes boxes{base, {}, {}, {}};
  bool is_allowed = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (int i = 0; i < 5; ++i) {
    boxes.sizes[i] = sizes[i];
    boxes.box[i] = box[i];
    if (i < 4) boxes.strides[i] = strides[i];
    is_allowed = is_allowed && box[i] <= 256 && (i == 4 || strides[i] % 4 == 0);
  }
  if (!is_allowed) return std::nullopt;
  CUtensorMap map{};
  std::memcpy(&map, &boxes, sizeof boxes);
  return map;
}

namespace emulation {
namespace {

constexpr int kRowBytes = 32;

template <class T>
constexpr int kRowElements = kRowBytes / sizeof(T);

int lane() { return static_cast<int>(thread_index.x) % 32; }

// Two neighbours of half types, or a float, as TF32 sees it.
template <class T>
void widen(uint32_t word, float* values) {
  if constexpr (sizeof(T) == 4) {
    *values = __uint_as_float(word & ~0x1fffu);
  } else {
    T halves[2];
    std::memcpy(static_cast<void*>(halves), &word, sizeof word);
    values[0] = static_cast<float>(halves[0]);
    values[1] = static_cast<float>(halves[1]);
  }
}

// 32 bytes of channels of a row or column in shared memory: the lower 16 and, so far behind them, the upper.
template <class T>
void load_row(uint64_t descriptor, int row, float (&values)[kRowElements<T>]) {
  const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t first = field(0) + row / 8 * field(32) + row % 8 * 16;
  for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
    std::memcpy(words, shared_at(first + half * field(16), 16), 16);
    for (int i = 0; i < 4; ++i) widen<T>(words[i], values + (half * 4 + i) * (4 / sizeof(T)));
  }
}

// Words of the two rows of a that this lane's sums are of, from registers: four neighbouring lanes have one each of
// either 16 bytes. All lanes have to ask.
template <class T>
void rows_of_registers(const uint32_t* a, float (&rows)[2][kRowElements<T>]) {
  LaneWords& words = words_of_warp();
  std::memcpy(words[lane()], a, 4 * sizeof *a);
  synchronize_warp();
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 8; ++i) {
      widen<T>(words[lane() / 4 * 4 + i % 4][half + i / 4 * 2], rows[half] + i * (4 / sizeof(T)));
    }
  }
  synchronize_warp();
}

template <int Count>
float dot(const float (&row)[Count], const float (&column)[Count]) {
  float sum = 0;
  for (int k = 0; k < Count; ++k) sum += row[k] * column[k];
  return sum;
}

// This lane's sums: of rows lane / 4 and eight more, two columns of every eight from 2 * (lane % 4) on, which
// `load_column` loads.
template <class T, class Load>
void add_products(const float (&rows)[2][kRowElements<T>], int columns, float* sums, const Load& load_column) {
  for (int i = 0; i < columns / 8 * 2; ++i) {
    float column[kRowElements<T>];
    load_column(i / 2 * 8 + lane() % 4 * 2 + i % 2, column);
    for (int half = 0; half < 2; ++half) sums[i / 2 * 4 + half * 2 + i % 2] += dot(rows[half], column);
  }
}

void check_alignment(uint32_t shared, const void* global, uint32_t bytes) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw std::logic_error("a bulk copy of " + std::to_string(bytes) + " bytes that is not aligned to 16");
  }
}

}  // namespace

uint32_t word_at(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, shared_at(address, 4), 4);
  return word;
}

uint32_t or_of_warp(uint32_t bits) {
  LaneWords& words = words_of_warp();
  words[lane()][0] = bits;
  synchronize_warp();
  uint32_t all = 0;
  for (const auto& word : words) all |= word[0];
  synchronize_warp();
  return all;
}

float round_to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return __uint_as_float((__float_as_uint(value) + 0x1000u) & ~0x1fffu);
}

template <int Count>
void load_matrices(uint32_t (&words)[Count], uint32_t row, bool transposed) {
  LaneWords& rows = words_of_warp();
  rows[lane()][0] = row;
  synchronize_warp();
  for (int i = 0; i < Count; ++i) {
    if (!transposed) {
      words[i] = word_at(rows[8 * i + lane() / 4][0] + 4 * (lane() % 4));
    } else {
      uint16_t halves[2];
      for (int k = 0; k < 2; ++k) {
        std::memcpy(&halves[k], shared_at(rows[8 * i + lane() % 4 * 2 + k][0] + 2 * (lane() / 4), 2), 2);
      }
      std::memcpy(&words[i], halves, 4);
    }
  }
  synchronize_warp();
}

void store_matrices(uint32_t row, const uint32_t (&words)[4], bool transposed) {
  LaneWords& rows = words_of_warp();
  rows[lane()][0] = row;
  synchronize_warp();
  for (int i = 0; i < 4; ++i) {
    if (!transposed) {
      std::memcpy(shared_at(rows[8 * i + lane() / 4][0] + 4 * (lane() % 4), 4), &words[i], 4);
    } else {
      uint16_t halves[2];
      std::memcpy(halves, &words[i], 4);
      for (int k = 0; k < 2; ++k) {
        std::memcpy(shared_at(rows[8 * i + lane() % 4 * 2 + k][0] + 2 * (lane() / 4), 2), &halves[k], 2);
      }
    }
  }
  synchronize_warp();
}

template <class T>
void multiply(const uint32_t* a, uint64_t b, int columns, float* sums, bool keeps) {
  float rows[2][kRowElements<T>];
  rows_of_registers<T>(a, rows);
  if (!keeps) std::memset(sums, 0, columns / 2 * sizeof(float));
  add_products<T>(rows, columns, sums, [b](int column, auto& values) { load_row<T>(b, column, values); });
}

template <class T>
void multiply_shared(uint64_t a, uint64_t b, int columns, float* sums) {
  float rows[2][kRowElements<T>];
  for (int half = 0; half < 2; ++half) {
    load_row<T>(a, static_cast<int>(thread_index.x) % 128 / 32 * 16 + half * 8 + lane() / 4, rows[half]);
  }
  add_products<T>(rows, columns, sums, [b](int column, auto& values) { load_row<T>(b, column, values); });
}

template <class T>
void multiply_columns(const uint32_t* a, const uint32_t* b, float* sums) {
  float rows[2][kRowElements<T>];
  rows_of_registers<T>(a, rows);
  LaneWords& words = words_of_warp();
  std::memcpy(words[lane()], b, 2 * sizeof *b);
  synchronize_warp();
  add_products<T>(rows, 8, sums, [&words](int column, auto& values) {
    for (int k = 0; k < 8; ++k) widen<T>(words[column * 4 + k % 4][k / 4], values + k * (4 / sizeof(T)));
  });
  synchronize_warp();
}

template <class T>
void multiply_transposed(const uint32_t* a, uint64_t b, int columns, float* sums) {
  float rows[2][kRowElements<T>];
  rows_of_registers<T>(a, rows);
  const auto field = [b](int bit) { return static_cast<uint32_t>(b >> bit & 0x3fff) * 16; };
  add_products<T>(rows, columns, sums, [&field](int column, auto& values) {
    const uint32_t first = field(0) + column / 8 * field(32) + 2 * (column % 8);
    for (int k = 0; k < kRowElements<T>; ++k) {
      T value;
      std::memcpy(static_cast<void*>(&value), shared_at(first + k / 8 * field(16) + k % 8 * 16, 2), 2);
      values[k] = static_cast<float>(value);
    }
  });
}

int32_t sum_of_warp(int32_t value) {
  LaneWords& words = words_of_warp();
  words[lane()][0] = static_cast<uint32_t>(value);
  synchronize_warp();
  uint32_t sum = 0;
  for (const auto& word : words) sum += word[0];
  synchronize_warp();
  return static_cast<int32_t>(sum);
}

template void load_matrices<2>(uint32_t (&)[2], uint32_t, bool);
template void load_matrices<4>(uint32_t (&)[4], uint32_t, bool);
template void multiply_columns<float>(const uint32_t*, const uint32_t*, float*);
template void multiply_columns<__half>(const uint32_t*, const uint32_t*, float*);
template void multiply_columns<__nv_bfloat16>(const uint32_t*, const uint32_t*, float*);
template void multiply_transposed<__half>(const uint32_t*, uint64_t, int, float*);
template void multiply_transposed<__nv_bfloat16>(const uint32_t*, uint64_t, int, float*);
template void multiply<float>(const uint32_t*, uint64_t, int, float*, bool);
template void multiply<__half>(const uint32_t*, uint64_t, int, float*, bool);
template void multiply<__nv_bfloat16>(const uint32_t*, uint64_t, int, float*, bool);
template void multiply_shared<float>(uint64_t, uint64_t, int, float*);
template void multiply_shared<__half>(uint64_t, uint64_t, int, float*);
template void multiply_shared<__nv_bfloat16>(uint64_t, uint64_t, int, float*);

void copy_bulk(uint32_t shared, const void* global, uint32_t bytes) {
  check_alignment(shared, global, bytes);
  std::memcpy(shared_at(shared, bytes), global, bytes);
}

void store_bulk(void* global, uint32_t shared, uint32_t bytes) {
  check_alignment(shared, global, bytes);
  begin(Unit::bulk_stores, [=] { std::memcpy(global, shared_at(shared, bytes), bytes); });
}

void copy_async(uint32_t shared, const void* global, uint32_t bytes, bool valid) {
  if (shared % bytes != 0 || (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)) {
    throw std::logic_error("a copy of " + std::to_string(bytes) + " bytes that is not aligned to them");
  }
  begin(Unit::copies, [=] {
    if (valid) {
      std::memcpy(shared_at(shared, bytes), global, bytes);
    } else {
      std::memset(shared_at(shared, bytes), 0, bytes);
    }
  });
}

int64_t copy_box(uint32_t shared, const void* map, const int (&at)[5]) {
  Boxes boxes;
  std::memcpy(&boxes, map, sizeof boxes);
  if (shared % 128 != 0) throw std::logic_error("a box at " + std::to_string(shared));
  int64_t elements = 1;
  for (const int32_t extent : boxes.box) elements *= extent;
  for (int64_t element = 0; element < elements; ++element) {
    int64_t left = element, place = 0;
    bool is_inside = true;
    for (int axis = 0; axis < 5; ++axis) {
      const int64_t index = at[axis] + left % boxes.box[axis];
      left /= boxes.box[axis];
      is_inside = is_inside && index >= 0 && index < boxes.sizes[axis];
      place += index * (axis == 0 ? 1 : boxes.strides[axis - 1]);
    }
    const float value = is_inside ? boxes.base[place] : 0.0f;
    std::memcpy(shared_at(shared + static_cast<uint32_t>(element) * 4, 4), &value, 4);
  }
  return elements * 4;
}

}  // namespace emulation
}  // namespace convt3d
