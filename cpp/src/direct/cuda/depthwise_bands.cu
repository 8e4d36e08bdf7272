// Forward of half types' depthwise layers on tensor cores, NCDHW.
//
// Sixteen neighbouring destinations of a row come from a window of sixteen neighbouring sources by a matrix of one row
// of taps that is the same for every window: zero beside a band along its diagonal. A warp multiplies the windows of 16
// places by it at once, once for each source row that a destination row meets. An eighth of these products count, but
// tensor cores have them to spare, and an element takes neither a conversion nor an instruction for each of its taps,
// which are what bounds plain multiplications: 64 channels, batch 2, 48^3 at kernel 4, stride 2 must move 0.26 GB, at
// least 0.060 ms on an H200, for 0.9 G multiplications, which with all that comes with them took 0.115 there, and take
// 0.085 so.
//
// Zeros of the band meet sources that are not a destination's, which makes infinities and NaNs spread: results that are
// not finite are gathered anew, tap by tap.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/finiteness.h"
#include "direct/cuda/kernels.h"
#include "direct/cuda/rows.h"
#include "direct/shared_memory.h"

namespace convt3d::direct {
namespace {

constexpr int kMostWarps = 8, kResidentBlocks = 2;  // of a block, and of a multiprocessor
constexpr int kWindow = 16;                         // destinations of a window, and sources
constexpr int kOfLane = 4;                          // destinations that a lane holds of a window, neighbours

// The taps of a row between a window's destinations and its sources, of which the first lies at `first`, counted from
// the source that is as far from the row's begin as the window's first destination.
struct Band {
  int stride = 1, padding = 0, dilation = 1, kernel = 1;
  int first = 0;  // even, so that windows begin with words where rows do
  Divisor<int32_t> by_dilation;

  explicit Band(const Axis<int32_t>& width)
      : stride(width.stride),
        padding(width.padding),
        dilation(width.dilation),
        kernel(width.kernel),
        by_dilation(width.dilation) {}

  // What a destination and a source have in common; -1 for no tap.
  __device__ int tap(int destination, int source) const {
    const int distance = destination + padding - stride * source;
    if (distance < 0) return -1;
    const int tap = by_dilation.quotient(distance);
    return tap * dilation == distance && tap < kernel ? tap : -1;
  }

  // A lane's share of the band for the window that begins with `destination`: of two matrices of eight columns, B in
  // cuda/ptx.h, so that the lane gets the sums of neighbours.
  struct Fragment {
    int taps[8];

    __device__ Fragment(const Band& band, int destination, int lane) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = lane / 8 * kOfLane + i / 4 * 2 + lane / 4 % 2;
        taps[i] = band.tap(destination + column, band.first + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2);
      }
    }

    // Of a row of weights.
    template <class T>
    __device__ uint4 of(const T* weights) const {
      Elements<T, 8> all;
#pragma unroll
      for (int i = 0; i < 8; ++i) all.element[i] = taps[i] < 0 ? T(0.0f) : weights[taps[i]];
      return *reinterpret_cast<const uint4*>(&all);
    }
  };
};

struct Axes {
  Axis<int32_t> depth, height, width;

  explicit Axes(const Problem& problem) : depth(problem, 0), height(problem, 1), width(problem, 2) {}
};

// One destination, tap by tap.
template <class T>
__device__ __forceinline__ float gathered_alone(const Axes& in, const T* volume, const T* weights, int z, int y,
                                                int x) {
  const TapWalk<int32_t> d = in.depth.taps_at(z), h = in.height.taps_at(y), w = in.width.taps_at(x);
  float sum = 0;
  for (int a = 0; a < d.count; ++a) {
    for (int b = 0; b < h.count; ++b) {
      const int row = (d.index - a * in.depth.index_step) * in.height.input + h.index - b * in.height.index_step;
      const int tap_row = (d.tap + a * in.depth.tap_step) * in.height.kernel + h.tap + b * in.height.tap_step;
      for (int c = 0; c < w.count; ++c) {
        const T source = volume[row * in.width.input + w.index - c * in.width.index_step];
        const T weight = weights[tap_row * in.width.kernel + w.tap + c * in.width.tap_step];
        sum += static_cast<float>(source) * static_cast<float>(weight);
      }
    }
  }
  return sum;
}

// A lane's neighbouring sums in the tensors' type, as words: structures of half types would be stored one by one.
template <class T>
__device__ __forceinline__ uint2 words_of(const float (&pairs)[2][4], int m) {
  const float sums[kOfLane] = {pairs[0][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m], pairs[1][2 * m + 1]};
  const Elements<T, kOfLane> results = rounded<T>(sums);
  return *reinterpret_cast<const uint2*>(&results);
}

template <class T>
struct UpsamplingArguments : Axes {
  Band band;
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  int channels;
  int64_t volumes;                            // channels of all samples
  int64_t source_volume, destination_volume;  // elements
  int plane_shifts, row_shifts;               // source planes and rows that a destination meets at most
  int first_q, rows;                          // of (row + padding) / 2
  int windows, window_step;                   // of a row, and sources from one to the next
  int tile_rows, tiles, plane_pairs;
  int block_pairs;              // pairs of planes that a block makes one after the other
  int stage_rows, row_vectors;  // of shared memory: rows of a plane, and what is copied of each
  int pitch, margin;            // elements from row to row, and before the band's first
  int run_pitch;                // elements from plane to plane of the outputs there
  bool whole_vectors;           // whether source rows are
  int stage_elements;           // of a stage
  int places;                   // of a plane's rows, filled up to whole items
  size_t band_bytes, run_bytes;
  Divisor<int32_t> by_tiles, by_windows, by_vectors, by_stage_rows;
};

constexpr int kStride = 2;  // along depth and height: destinations that share their sources
constexpr int kStages = 2;  // of shared memory: one is read while the other is filled

// Rows of destinations: whole sectors of 32 bytes, or whole words, or such that every other one begins between words.
enum class Rows { sectors, words, odd };

// What a lane needs for its four destinations of a place, in both rows, where these are no whole sectors: found once,
// as it takes more instructions than their products.
struct Place {
  uint32_t from;    // bytes from the stage's begin to the place's window
  uint16_t to;      // elements from the row before the block's first one
  uint16_t stores;  // bits, three for each row: the first word, the second one, and an element alone
};

// With plane + padding = 2 * q + p, tap j of residue p = j % 2 reads source plane q - j / 2, and rows alike, so that a
// fragment of windows serves two planes and two rows of each. A block makes rows of a few pairs of planes. It puts the
// bands and, one pair ahead, the sources that a pair meets into shared memory, with zeros around them. A warp has one
// plane of each pair and makes 16 windows of neighbouring places at once, in both rows, of which a lane gets four
// neighbours. Rows that are whole sectors are stored at once, a window's 32 bytes by four lanes. Else the block puts
// them together in shared memory and stores them as the one run of memory that they are; windows of a row that begins
// between words begin one element earlier. kShifts is how many source planes, and rows, a destination meets at most,
// and bands stay in registers; 0 takes any number, and reads them from shared memory each time. Bound by memory, which
// on an H200 takes 120 cycles for 1024 outputs, next by instructions, some 360 for these where rows are sectors (kernel
// 4), 350 where they are odd (kernel 3), that four schedulers share, and by two blocks being few to hide latencies.
template <class T, Rows kRows, int kShifts>
__global__ void __launch_bounds__(32 * kMostWarps, kResidentBlocks)
    upsample_by_bands(const __grid_constant__ UpsamplingArguments<T> in) {
  constexpr int kVector = 16 / sizeof(T), kVariants = kRows == Rows::odd ? 2 : 1;
  extern __shared__ __align__(16) unsigned char shared[];
  uint4* const bands = reinterpret_cast<uint4*>(shared);  // shift of planes, of rows, p, r, variant, lane
  T* const stages = reinterpret_cast<T*>(shared + in.band_bytes);
  T* const runs = stages + kStages * in.stage_elements;
  Place* const place_table = reinterpret_cast<Place*>(reinterpret_cast<unsigned char*>(runs) + in.run_bytes);
  const int plane_shifts = kShifts > 0 ? kShifts : in.plane_shifts, row_shifts = kShifts > 0 ? kShifts : in.row_shifts;
  const Axis<int32_t>&depth = in.depth, &height = in.height, &width = in.width;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int chunk = in.by_tiles.quotient(static_cast<int>(blockIdx.x));
  const int first_row = (static_cast<int>(blockIdx.x) - chunk * in.tiles) * in.tile_rows;  // of q
  const int rows = smaller(in.tile_rows, in.rows - first_row), first_q = in.first_q + first_row;
  const int row_begin = larger(kStride * first_q - height.padding, 0);
  const int made_rows = smaller(kStride * (first_q + rows) - height.padding, height.output) - row_begin;
  const int before = row_begin - (kStride * first_q - height.padding);  // rows that do not exist
  const int items = (rows * in.windows + 15) / 16;
  const int first_pair = chunk * in.block_pairs, end_pair = smaller(first_pair + in.block_pairs, in.plane_pairs);
  const int row_bytes = in.pitch * static_cast<int>(sizeof(T)), plane_bytes = in.stage_rows * row_bytes;
  const int window_bytes = in.window_step * static_cast<int>(sizeof(T));
  const auto stage_address = [&](int stage) {
    return ptx::shared_address(stages + stage * in.stage_elements + in.margin + lane % 4 * 2);
  };

  for (int64_t volume = blockIdx.y; volume < in.volumes; volume += gridDim.y) {
    const int channel = static_cast<int>(volume % in.channels);
    const T* const source = in.source + volume * in.source_volume;
    const T* const weights = in.weight + static_cast<int64_t>(channel) * depth.kernel * height.kernel * width.kernel;
    const float bias = in.bias == nullptr ? 0 : static_cast<float>(in.bias[channel]);
    // A pair's, or those of none behind the block's last, which are one group of copies as well.
    const auto copy_sources = [&](int pair) {
      const int q_d = depth.padding / kStride + pair;
      const int vectors = pair < end_pair ? plane_shifts * in.stage_rows * in.row_vectors : 0;
      T* const stage = stages + (pair - first_pair) % kStages * in.stage_elements;
      for (int i = threadIdx.x; i < vectors; i += threads) {
        const int line = in.by_vectors.quotient(i), plane_shift = in.by_stage_rows.quotient(line);
        const int plane = q_d - plane_shift, row = first_q - (row_shifts - 1) + line - plane_shift * in.stage_rows;
        const int column = in.band.first - in.margin + kVector * (i - line * in.row_vectors);
        const bool row_inside = static_cast<unsigned>(plane) < static_cast<unsigned>(depth.input) &&
                                static_cast<unsigned>(row) < static_cast<unsigned>(height.input);
        const auto inside = [&](int e) {
          return row_inside && static_cast<unsigned>(column + e) < static_cast<unsigned>(width.input);
        };
        const T* const from = source + ((plane * height.input + row) * width.input + column);
        T* const to = stage + (line * in.pitch + kVector * (i - line * in.row_vectors));
        if (in.whole_vectors) {
          ptx::copy_vector(to, from, inside(0));
        } else {
          Elements<T, kVector> all;
#pragma unroll
          for (int e = 0; e < kVector; ++e) all.element[e] = inside(e) ? from[e] : T(0.0f);
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&all);
        }
      }
      ptx::commit_copies();
    };
    __syncthreads();  // The bands and stages before have been read.
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) copy_sources(first_pair + i);
    for (int variant = 0; variant < kVariants; ++variant) {
      const Band::Fragment fragment(in.band, -variant, lane);
      for (int line = warp; line < plane_shifts * row_shifts * kStride * kStride; line += warps) {
        const int shift = line / (kStride * kStride), plane_shift = shift / row_shifts;
        const int j_d = kStride * plane_shift + line / kStride % kStride;
        const int j_h = kStride * (shift - plane_shift * row_shifts) + line % kStride;
        const bool lives = j_d < depth.kernel && j_h < height.kernel;
        bands[(line * kVariants + variant) * 32 + lane] =
            lives ? fragment.of(weights + (j_d * height.kernel + j_h) * width.kernel) : uint4{};
      }
    }
    __syncthreads();

    // The warp's plane of each pair, and where its rows from row_begin on lie in the first; rows of a residue all begin
    // between words or with one, which tells the bands that are theirs.
    const int p = warp % kStride, first_z = kStride * (depth.padding / kStride + first_pair) - depth.padding;
    const int plane_elements = height.output * width.output;
    T* const planes = in.destination + volume * in.destination_volume + static_cast<int64_t>(first_z) * plane_elements +
                      row_begin * width.output;
    int odd[kStride];
    // Where rows begin between words, and where they end there: the column of a lane that has the element outside of
    // whole words, and which of its four that is.
    int lone_column[kStride], lone[kStride];
    const uint4* band_of[kStride];
#pragma unroll
    for (int r = 0; r < kStride; ++r) {
      odd[r] =
          kRows == Rows::odd ? ptx::opaque((elements_past_vector(planes + p * plane_elements) + r - before) & 1) : 0;
      lone[r] = ptx::opaque(odd[r] != 0 ? 1 : (width.output - 1) % kOfLane);
      lone_column[r] = odd[r] != 0 ? -1 : width.output - 1 - lone[r];
      band_of[r] = bands + (((p * kStride + r) * kVariants + odd[r]) * 32 + lane);
    }
    constexpr int kShiftsOfBoth = kShifts * kShifts, kLine = kStride * kStride * kVariants * 32;
    uint4 kept[kShifts > 0 ? kShiftsOfBoth : 1][kStride];
#pragma unroll
    for (int i = 0; i < kShiftsOfBoth; ++i) {
#pragma unroll
      for (int r = 0; r < kStride; ++r) kept[i][r] = band_of[r][i * kLine];
    }

    if constexpr (kRows != Rows::sectors) {
      for (int i = warp / kStride * 32 + lane; i < 4 * in.places; i += warps / kStride * 32) {
        const int row = in.by_windows.quotient(i / 4), window = i / 4 - row * in.windows;
        const int made_row = kStride * row - before, first_column = kWindow * window + i % 4 * kOfLane;
        Place place{static_cast<uint32_t>(smaller(row, rows - 1) * row_bytes + window * window_bytes),
                    static_cast<uint16_t>((made_row + 1) * width.output + first_column), 0};
#pragma unroll
        for (int r = 0; r < kStride; ++r) {
          const int column = first_column - odd[r];
          const bool lives = static_cast<unsigned>(made_row + r) < static_cast<unsigned>(made_rows);
          const auto whole = [&](int first) {
            return lives && static_cast<unsigned>(first) < static_cast<unsigned>(width.output - 1);
          };
          const bool alone = kRows == Rows::odd && lives && column == lone_column[r];
          const int bits = (whole(column) ? 1 : 0) | (whole(column + 2) ? 2 : 0) | (alone ? 4 : 0);
          place.stores = static_cast<uint16_t>(place.stores | bits << 3 * r);
        }
        place_table[p * 4 * in.places + i] = place;
      }
    }

    int stage = 0;
    for (int pair = first_pair; pair < end_pair; ++pair) {
      const int z = first_z + kStride * (pair - first_pair);
      const auto exists = [&](int i) { return static_cast<unsigned>(z + i) < static_cast<unsigned>(depth.output); };
      T* const pair_planes = planes + static_cast<int64_t>(pair - first_pair) * kStride * plane_elements;
      // Where the block makes a plane's rows, between vectors as in the volume.
      const auto made_at = [&](int i) {
        T* const plane = pair_planes + i * plane_elements;
        if constexpr (kRows == Rows::sectors) {
          return plane;
        } else {
          return runs + i * in.run_pitch + elements_past_vector(plane);
        }
      };
      ptx::wait_for_copies<kStages - 2>();
      ptx::wait_for_bulk_stores<0>();
      __syncthreads();  // The stage has arrived, and the one before and its run have been read.
      copy_sources(pair + kStages - 1);
      const uint32_t sources = stage_address(stage) + (row_shifts - 1) * row_bytes;
      stage = stage == kStages - 1 ? 0 : stage + 1;

      T* const made = kRows == Rows::sectors ? ptx::opaque_global(made_at(p)) : made_at(p);
      const uint32_t made_before =
          kRows == Rows::sectors ? 0 : ptx::shared_address(made) - static_cast<uint32_t>(sizeof(T)) * width.output;
      for (int item = exists(p) ? warp / kStride : items; item < items; item += warps / kStride) {
        // A lane's places are windows lane / 4 of each eight. Those behind the last read the last row's sources.
        int place_row[2], place_column[2];   // from row_begin on
        uint32_t from[2], to[2], stores[2];  // in shared memory
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if constexpr (kRows == Rows::sectors) {
            const int place = item * 16 + 8 * m + lane / 4;
            const int row = in.by_windows.quotient(place), window = place - row * in.windows;
            place_row[m] = kStride * row - before;
            place_column[m] = kWindow * window + lane % 4 * kOfLane;
            from[m] = sources + smaller(row, rows - 1) * row_bytes + window * window_bytes;
          } else {
            const Place place = place_table[p * 4 * in.places + (item * 16 + 8 * m) * 4 + lane];
            from[m] = sources + place.from;
            to[m] = made_before + static_cast<uint32_t>(sizeof(T)) * place.to;
            stores[m] = place.stores;
          }
        }
        float sum[kStride][2][4] = {};
        const auto add_products = [&](int plane_shift, int row_shift, const uint4(&fragments)[kStride]) {
          uint32_t a[4];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t at = from[m] + plane_shift * plane_bytes - row_shift * row_bytes;
            a[m] = ptx::load_shared<0>(at);
            a[m + 2] = ptx::load_shared<16>(at);
          }
#pragma unroll
          for (int r = 0; r < kStride; ++r) {
            const uint32_t b[2][2] = {{fragments[r].x, fragments[r].y}, {fragments[r].z, fragments[r].w}};
#pragma unroll
            for (int i = 0; i < 2; ++i) ptx::mma<T>(sum[r][i], a, b[i]);
          }
        };
        if constexpr (kShifts > 0) {
#pragma unroll
          for (int i = 0; i < kShiftsOfBoth; ++i) add_products(i / kShifts, i % kShifts, kept[i]);
        } else {
          int line = 0;
          for (int plane_shift = 0; plane_shift < plane_shifts; ++plane_shift) {
            for (int row_shift = 0; row_shift < row_shifts; ++row_shift, line += kLine) {
              const uint4 fragments[kStride] = {band_of[0][line], band_of[1][line]};
              add_products(plane_shift, row_shift, fragments);
            }
          }
        }

        if (in.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < kStride * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] += bias;
        }
        Finiteness<T> finite;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int place_at = kRows == Rows::sectors ? place_row[m] * width.output + place_column[m] : 0;
#pragma unroll
          for (int r = 0; r < kStride; ++r) {
            const uint2 words = words_of<T>(sum[r], m);
            finite.see(words.x);
            finite.see(words.y);
            if constexpr (kRows == Rows::sectors) {
              const bool lives = static_cast<unsigned>(place_row[m] + r) < static_cast<unsigned>(made_rows);
              T* const at = made + (place_at + r * width.output);
              if (lives) *reinterpret_cast<uint64_t*>(at) = uint64_t{words.y} << 32 | words.x;
            } else {
              const uint32_t at = to[m] + static_cast<int>(sizeof(T)) * (r * width.output - odd[r]);
              ptx::store_shared_if_any(stores[m] & 1 << 3 * r, at, words.x);
              ptx::store_shared_if_any(stores[m] & 2 << 3 * r, at + 4, words.y);
              if constexpr (kRows == Rows::odd) {
                const uint32_t element = __byte_perm(words.x, words.y, 0x1010 + 0x2222 * lone[r]);
                ptx::store_shared_if_any(stores[m] & 4 << 3 * r, at + 2 * lone[r], static_cast<uint16_t>(element));
              }
            }
          }
        }
        if (finite.all()) continue;
#pragma unroll 1
        for (int i = 0; i < kStride * 2 * kOfLane; ++i) {
          const int e = i % kOfLane, m = i / kOfLane % 2, r = i / kOfLane / 2;
          const int place = item * 16 + 8 * m + lane / 4, q = in.by_windows.quotient(place);
          const int row = kStride * q + r - before;
          const int column = kWindow * (place - q * in.windows) + lane % 4 * kOfLane - (r == 0 ? odd[0] : odd[1]) + e;
          if (row < 0 || row >= made_rows || column < 0 || column >= width.output) continue;
          made[row * width.output + column] =
              static_cast<T>(bias + gathered_alone(in, source, weights, z + p, row_begin + row, column));
        }
      }
      if constexpr (kRows != Rows::sectors) {
        ptx::fence_shared_for_wgmma();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kStride; ++i) {
          if (exists(i)) store_run_in_bulk(pair_planes + i * plane_elements, made_at(i), made_rows * width.output, i);
        }
      }
    }
  }
  ptx::wait_for_bulk_stores<0>();  // Shared memory is to last that long.
}

// A block's shared memory for its outputs, and at most for its bands and its sources.
constexpr int64_t kRunBytes = 40 * 1024, kBandBytes = 40 * 1024, kStageBytes = 24 * 1024;

// Windows that a block makes of each plane and residue, about.
constexpr int kBlockWindows = 320;

// How many pairs of planes a block makes one after the other, so that all blocks of `columns` times as many pairs end
// at about the same time: those of one multiprocessor share it, and each begins with its bands and without sources,
// which takes about as long as a pair.
int pairs_of_block(int pairs, int64_t columns, int64_t multiprocessors) {
  constexpr int kMostChunks = 1024;
  int best = 1;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int chunks = 1; chunks <= std::min(pairs, kMostChunks);) {
    const int each = ceil_divide(pairs, chunks);
    const int64_t blocks = ceil_divide(pairs, each) * columns;
    const int64_t time = ceil_divide(blocks, kResidentBlocks * multiprocessors) * (each + 1);
    if (time < least) {
      least = time;
      best = each;
    }
    if (each == 1) break;
    chunks = ceil_divide(pairs, each - 1);  // the fewest that have less each
  }
  return best;
}

template <class T, Rows kRows>
auto kernel_for(int plane_shifts, int row_shifts) {
  if (plane_shifts == 1 && row_shifts == 1) return upsample_by_bands<T, kRows, 1>;
  if (plane_shifts == 2 && row_shifts == 2) return upsample_by_bands<T, kRows, 2>;
  return upsample_by_bands<T, kRows, 0>;
}

}  // namespace

template <class T>
bool forward_by_bands(const Problem& problem, const Target& target, const T* source, const T* weight, const T* bias,
                      T* destination, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (target.compute_capability < 80 || problem.layout != Layout::ncdhw) return false;
  for (int axis = 0; axis < 2; ++axis) {
    if (problem.stride[axis] != kStride || problem.dilation[axis] != 1) return false;
  }
  if (problem.stride[2] != 2 && problem.stride[2] != 4) return false;
  // One tap of a destination takes as long by plain multiplications, which begin sooner.
  if (problem.kernel[0] <= kStride && problem.kernel[1] <= kStride && problem.kernel[2] <= problem.stride[2]) {
    return false;
  }
  const Axes axes(problem);
  UpsamplingArguments<T> in{axes, Band(axes.width), source, weight, bias, destination};
  const Axis<int32_t>&depth = axes.depth, &height = axes.height, &width = axes.width;
  if (width.output < kOfLane) return false;
  const Rows rows = width.output % 2 == 1                                                               ? Rows::odd
                    : width.output % kWindow == 0 && reinterpret_cast<uintptr_t>(destination) % 32 == 0 ? Rows::sectors
                                                                                                        : Rows::words;
  if (rows == Rows::words && elements_past_vector(destination) % 2 == 1) return false;
  const int variants = rows == Rows::odd ? 2 : 1;
  // The sources that meet a window's first and last destination, of either variant.
  const int lowest = width.padding - (variants - 1) - (width.kernel - 1) * width.dilation;
  in.band.first = floor_divide(floor_divide(lowest, width.stride), 2) * 2;
  if (floor_divide(kWindow - 1 + width.padding, width.stride) >= in.band.first + kWindow) return false;
  in.channels = static_cast<int>(problem.in_channels);
  in.volumes = problem.batch * problem.in_channels;
  in.source_volume = problem.input_voxels();
  in.destination_volume = problem.output_voxels();
  in.plane_shifts = ceil_divide(depth.kernel, kStride);
  in.row_shifts = ceil_divide(height.kernel, kStride);
  in.first_q = height.padding / kStride;
  in.rows = ceil_divide(height.output + height.padding % kStride, kStride);
  in.windows = ceil_divide(width.output + variants - 1, kWindow);
  in.window_step = kWindow / width.stride;
  in.plane_pairs = ceil_divide(depth.output + depth.padding % kStride, kStride);
  in.margin = in.band.first - floor_divide(in.band.first, kVector) * kVector;
  in.row_vectors = ceil_divide(in.margin + in.window_step * (in.windows - 1) + kWindow, kVector);
  // Eight windows take every bank of shared memory once, wherever one row ends and the next begins.
  const int banks = 8 * in.window_step, needed = in.row_vectors * kVector;
  in.pitch = needed + ((in.window_step * in.windows - needed) % banks + banks) % banks / kVector * kVector;
  in.whole_vectors = width.input % kVector == 0 && elements_past_vector(source) == 0;
  in.tile_rows = equal_share(in.rows, std::max(kBlockWindows / in.windows, 1));
  if (rows != Rows::sectors) {
    const int64_t row_bytes = int64_t{kStride} * kStride * width.output * static_cast<int64_t>(sizeof(T));
    const int64_t most = (kRunBytes - kStride * 32) / row_bytes;
    if (most == 0) return false;
    in.tile_rows = equal_share(in.rows, static_cast<int>(std::min<int64_t>(in.tile_rows, most)));
  }
  in.tiles = ceil_divide(in.rows, in.tile_rows);
  in.stage_rows = in.tile_rows + in.row_shifts - 1;
  in.run_pitch = (ceil_divide(kStride * in.tile_rows * width.output, kVector) + 2) * kVector;
  const int64_t stage_bytes = int64_t{in.plane_shifts} * in.stage_rows * in.pitch * static_cast<int64_t>(sizeof(T));
  const int64_t lines = int64_t{variants} * in.plane_shifts * in.row_shifts * kStride * kStride;
  const int64_t band_bytes = lines * 32 * static_cast<int64_t>(sizeof(uint4));
  const int64_t run_bytes =
      rows == Rows::sectors ? 0 : int64_t{kStride} * in.run_pitch * static_cast<int64_t>(sizeof(T));
  const int items = ceil_divide(in.tile_rows * in.windows, 16);
  in.places = 16 * items;
  const int64_t place_bytes =
      rows == Rows::sectors ? 0 : int64_t{kStride} * 4 * in.places * static_cast<int64_t>(sizeof(Place));
  const int64_t shared_bytes = band_bytes + kStages * stage_bytes + run_bytes + place_bytes;
  if (stage_bytes > kStageBytes || band_bytes > kBandBytes || shared_bytes > shared_memory_of_block(target, 1)) {
    return false;
  }
  in.block_pairs = pairs_of_block(in.plane_pairs, in.tiles * in.volumes, target.parallelism);
  in.stage_elements = in.plane_shifts * in.stage_rows * in.pitch;
  in.band_bytes = static_cast<size_t>(band_bytes);
  in.run_bytes = static_cast<size_t>(run_bytes);
  in.by_tiles = Divisor<int32_t>(in.tiles);
  in.by_windows = Divisor<int32_t>(in.windows);
  in.by_vectors = Divisor<int32_t>(in.row_vectors);
  in.by_stage_rows = Divisor<int32_t>(in.stage_rows);
  const auto kernel = rows == Rows::odd       ? kernel_for<T, Rows::odd>(in.plane_shifts, in.row_shifts)
                      : rows == Rows::sectors ? kernel_for<T, Rows::sectors>(in.plane_shifts, in.row_shifts)
                                              : kernel_for<T, Rows::words>(in.plane_shifts, in.row_shifts);
  const int warps = kStride * ceil_divide(items, ceil_divide(items, kMostWarps / kStride));
  const dim3 grid(static_cast<unsigned>(ceil_divide(in.plane_pairs, in.block_pairs) * in.tiles),
                  static_cast<unsigned>(std::min<int64_t>(in.volumes, 65535)));
  launch("depthwise upsampling", kernel, grid, 32 * warps, static_cast<size_t>(shared_bytes), stream, in);
  return true;
}

template bool forward_by_bands(const Problem&, const Target&, const __half*, const __half*, const __half*, __half*,
                               cudaStream_t);
template bool forward_by_bands(const Problem&, const Target&, const __nv_bfloat16*, const __nv_bfloat16*,
                               const __nv_bfloat16*, __nv_bfloat16*, cudaStream_t);

}  // namespace convt3d::direct
