// grad_input of half types' depthwise layers on tensor cores, NCDHW, stride 2.
//
// The way back of depthwise_bands.cu: eight neighbouring destinations of a row come from a window of 24 neighbouring
// sources by one row of taps, as a matrix that is zero beside a band. 64 channels, batch 2, 48^3 at kernel 4 must move
// 0.26 GB, at least 0.060 ms on an H200, for 0.9 G multiplications, which with all that comes with them took 0.116
// there, and take 0.077 so.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "direct/cuda/bands.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/rows.h"
#include "direct/shared_memory.h"

namespace convt3d::direct {
namespace {

constexpr int kMostWarps = 3, kLeastWarps = 6;  // of a block, and of a multiprocessor
constexpr int kStride = 2;
constexpr int kWindow = 8, kReach = 24;        // destinations of a window, and sources
constexpr int kPlaceRows = 4;                  // of destinations: the windows of a place, one below the other
constexpr int kPeriod = kStride * kPlaceRows;  // source rows after which they lie alike between vectors
constexpr int kTableRow = 40;                  // elements: kStride * kWindow before a row of taps, and kReach
constexpr int kSlots = 3;                      // pairs of source planes in shared memory
constexpr int kBarrierBytes = 16;              // of shared memory, which vectors follow
constexpr int kVector = 8, kElementBytes = 2;  // elements of 16 bytes

// Blocks of so many warps on a multiprocessor, as registers for the bands allow.
constexpr int resident_blocks(int kernel) { return kernel == 3 ? 5 : 4; }

template <class T>
struct CorrelatingArguments {
  Axis<int32_t> depth, height, width;
  const T* source;
  const T* weight;
  T* destination;
  int channels;
  int64_t source_volume, destination_volume;  // elements
  int windows;                                // of a row
  int tile_rows, tiles;                       // of destinations
  int places;                                 // of a tile
  int64_t steps, share;                       // planes of all tiles, and those that a block makes
  int stage_rows, run_rows, runs;             // of a source plane in shared memory, of a run, and runs
  int lift, turn;                             // bytes left out of shared memory after one period of rows, and after two
  int plane_bytes, slot_bytes;                // of shared memory
  bool clears;                                // whether vectors hold more than one row
  bool whole_words;                           // whether destination rows are
  Divisor<int32_t> by_windows;

  // Bytes left out before a row. Eight places, half of them a period below the others, meet no bank twice.
  CONVT3D_HOST_DEVICE int left_out_before(int row) const {
    const int period = row / kPeriod;
    return period / 2 * turn + period % 2 * lift;
  }
};

// One destination, tap by tap.
template <class T>
__device__ __forceinline__ float gathered_alone(const Axis<int32_t>& depth, const Axis<int32_t>& height,
                                                const Axis<int32_t>& width, const T* volume, const T* weights, int z,
                                                int y, int x) {
  float sum = 0;
#pragma unroll 1
  for (int j_d = 0; j_d < depth.kernel; ++j_d) {
#pragma unroll 1
    for (int j_h = 0; j_h < height.kernel; ++j_h) {
#pragma unroll 1
      for (int j_w = 0; j_w < width.kernel; ++j_w) {
        const int d = depth.output_at(z, j_d), h = height.output_at(y, j_h), w = width.output_at(x, j_w);
        if (!inside(d, depth.output) || !inside(h, height.output) || !inside(w, width.output)) continue;
        sum += static_cast<float>(volume[(d * height.output + h) * width.output + w]) *
               static_cast<float>(weights[(j_d * height.kernel + j_h) * width.kernel + j_w]);
      }
    }
  }
  return sum;
}

// What a lane has of eight places, each of which is four windows, one below the other.
struct Places {
  // Where a place's first source lies in shared memory that the lane loads, but for its row; and the same for rows of
  // the next period, which more is left out before.
  uint32_t from, from_next;
  uint32_t within[2][2];  // masks of a window's first and last sources that its row has, by whether it begins earlier
  int to, live_rows;      // of the destinations

  template <class T>
  __device__ Places(const CorrelatingArguments<T>& in, uint32_t ring, int first_y, int lane, int item) {
    const int place = smaller(item * 8 + lane / 4, in.places - 1);
    const int below = in.by_windows.quotient(place / 2), window = place / 2 - below * in.windows;
    const int period = 2 * below + place % 2, y = first_y + kPlaceRows * period;
    // A row's last window ends with it.
    const int x = smaller(kWindow * window, in.width.input - kWindow);
    from = ring + kElementBytes * (kPeriod * period * in.width.output + kStride * x + lane % 4 * 2) +
           in.left_out_before(kPeriod * period);
    from_next = from + in.left_out_before(kPeriod * (period + 1)) - in.left_out_before(kPeriod * period);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = kStride * x - in.width.padding - i / 2 + i % 2 * 16 + lane % 4 * 2;
      within[i / 2][i % 2] =
          (inside(column, in.width.output) ? 0xffffu : 0u) | (inside(column + 1, in.width.output) ? 0xffff0000u : 0u);
    }
    to = y * in.width.input + x + lane % 4 * 2;
    live_rows = item * 8 + lane / 4 < in.places ? in.height.input - y : 0;
  }
};

// With d = 2 * z - padding + j, destination plane z meets source planes d, of which planes z and z + 1 have those of a
// pair in common, and rows alike. A block makes a tile's rows, plane after plane: it has the pairs that a plane meets
// in shared memory, and the next one is copied there meanwhile. Rows lie there as in the volume, so that a run of them
// is one bulk copy; what a window meets beside its row is masked, and rows outside of the volume are zeros. A warp
// makes eight places at once, of 8 x 4 destinations each: the upper half of A has the windows for a place's upper two
// rows, the lower half those for its lower two, and a window that is loaded serves both of the two. Bands stay in
// registers. They begin with a word, where the row of sources does not, one source earlier: which rows these are
// depends on the taps alone, as destinations lie two rows apart. Blocks share out all tiles' planes evenly, and are all
// there at once.
//
// Memory takes 980 cycles on an H200 for 1024 destinations, shared memory 600 for the fragments of kernel 4, tensor
// cores 400, and the four schedulers 700 for its 2700 instructions. Bound by latencies: 12 or 15 warps a
// multiprocessor, of which each takes 3700 cycles to a plane's place, half of them in products.
template <class T, int kKernel>
__global__ void __launch_bounds__(32 * kMostWarps, resident_blocks(kKernel))
    correlate_by_bands(const __grid_constant__ CorrelatingArguments<T> in) {
  CONVT3D_DYNAMIC_SHARED(16, shared);
  const Axis<int32_t>&depth = in.depth, &height = in.height, &width = in.width;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const uint32_t ring = ptx::shared_address(shared), barriers = ring + kSlots * in.slot_bytes;
  const auto barrier_of = [&](int slot) { return barriers + kBarrierBytes * slot; };
  T* const table = reinterpret_cast<T*>(shared + kSlots * (in.slot_bytes + kBarrierBytes));
  const int plane_elements = height.output * width.output;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) ptx::make_barrier(barrier_of(slot), kStride * in.runs);
  }
  uint32_t phases = 0;  // of the barriers
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kKernel * kKernel * kTableRow; i += threads) table[i] = T(0.0f);

  for (int64_t step = blockIdx.x * in.share, end_step = smaller(step + in.share, in.steps); step < end_step;) {
    const int64_t tile = step / depth.input, volume = tile / in.tiles;
    const int first_z = static_cast<int>(step - tile * depth.input);
    const int end_z = static_cast<int>(smaller<int64_t>(depth.input, first_z + end_step - step));
    step += end_z - first_z;
    const int first_y = static_cast<int>(tile - volume * in.tiles) * in.tile_rows;
    const int first_row = kStride * first_y - height.padding;  // of the sources
    // The run of a pair's rows that this thread has copied, less what lies outside of the volume.
    const int run = warp + lane * warps, run_plane = run >= in.runs ? 1 : 0;
    const int run_row = (run - run_plane * in.runs) * in.run_rows, run_begin = larger(first_row + run_row, 0);
    const int run_end = smaller(first_row + smaller(run_row + in.run_rows, in.stage_rows), height.output);
    const int run_place = run_plane * in.plane_bytes + in.left_out_before(run_row);

    const T* const source = in.source + volume * in.source_volume;
    const int past = elements_past_vector(source), end = past + static_cast<int>(in.source_volume);
    const T* const vectors = source - past;
    const T* const weights = in.weight + volume % in.channels * (kKernel * kKernel * width.kernel);
    // The first source of a row's windows, counted from `vectors` on.
    const auto first_source = [&](int plane, int row) {
      return past + plane * plane_elements + row * width.output - width.padding;
    };
    // Rows lie in shared memory as in the volume, so that a run of them is one copy.
    const auto copy_pair = [&](int pair, int slot) {
      const int first_plane = kStride * pair - depth.padding;
      if (run < kStride * in.runs) {
        const int plane = first_plane + run_plane, start = past + plane * plane_elements + run_begin * width.output;
        const int stop = start + (run_end - run_begin) * width.output, begin = start & ~(kVector - 1);
        // Whole vectors, of which the volume's last may have an end of its own.
        const int whole = smaller((stop + kVector - 1) & ~(kVector - 1), end & ~(kVector - 1));
        const int stage_first = first_source(plane, first_row) & ~(kVector - 1);
        const uint32_t to = ring + slot * in.slot_bytes + run_place + kElementBytes * (begin - stage_first);
        const bool exists = inside(plane, depth.output);
        if (exists && start < stop && begin < whole) {
          const uint32_t bytes = kElementBytes * (whole - begin);
          ptx::arrive_announcing(barrier_of(slot), bytes);
          ptx::copy_bulk(to, vectors + begin, bytes, barrier_of(slot));
        } else {
          ptx::arrive(barrier_of(slot));
        }
        if (exists && whole < stop) {
#pragma unroll 1
          for (int e = larger(whole, begin); e < stop; ++e) {
            ptx::store_shared_if(true, to + kElementBytes * (e - begin), reinterpret_cast<const uint16_t*>(vectors)[e]);
          }
          ptx::fence_shared_for_wgmma();
        }
      }
      if (first_plane >= 0 && first_plane + 1 < depth.output) return;
#pragma unroll 1
      for (int p = 0; p < kStride; ++p) {
        if (inside(first_plane + p, depth.output)) continue;
        for (int i = static_cast<int>(threadIdx.x); i < in.plane_bytes / 16; i += threads) {
          reinterpret_cast<uint4*>(shared + slot * in.slot_bytes + p * in.plane_bytes)[i] = uint4{};
        }
      }
      ptx::fence_shared_for_wgmma();
    };
    // Rows outside of the volume stay zeros but for what a copy's first and last vectors hold beside the volume's rows,
    // within 14 bytes, and as rows lie up to 14 bytes further, depending on the plane. One warp clears that once a pair
    // has arrived.
    const auto clear_around_rows = [&](int pair, int slot) {
      constexpr int kElements = 32 / kElementBytes;
      if (warp != 0) return;
      const int p = lane / kElements, e = lane % kElements, rows_below = height.output - first_row;
      const int first = first_source(kStride * pair - depth.padding + p, first_row) & (kVector - 1);
      const auto address_of = [&](int stage_row, int run_of) {
        return ring + slot * in.slot_bytes + p * in.plane_bytes + in.left_out_before(run_of) +
               kElementBytes * (first + width.padding + stage_row * width.output);
      };
      ptx::store_shared_if(first_row < 0, address_of(-first_row, -first_row) - kElementBytes * (e + 1), uint16_t{0});
      ptx::store_shared_if(inside(rows_below - 1, in.stage_rows - 1),
                           address_of(rows_below, rows_below - 1) + kElementBytes * e, uint16_t{0});
      ptx::fence_shared_for_wgmma();
    };
    const auto wait_for_pair = [&](int slot) {
      ptx::wait(barrier_of(slot), phases >> slot & 1);
      phases ^= 1u << slot;
    };

    __syncthreads();  // Shared memory has been read for the rows before.
    for (int i = static_cast<int>(threadIdx.x); i < kSlots * in.slot_bytes / 16; i += threads) {
      reinterpret_cast<uint4*>(shared)[i] = uint4{};
    }
    ptx::fence_shared_for_wgmma();
    __syncthreads();
    copy_pair(first_z, 0);
    copy_pair(first_z + 1, 1);

    Places places(in, ring, first_y, lane, warp);

    // A row of taps by their distance from a window's first destination, with zeros around; and the same one further.
    for (int i = static_cast<int>(threadIdx.x); i < kKernel * kKernel * width.kernel; i += threads) {
      const int line = i / width.kernel, distance = (i - line * width.kernel) * width.dilation;
      for (int earlier = 0; earlier < 2; ++earlier) {
        table[(earlier * kKernel * kKernel + line) * kTableRow + kStride * kWindow + earlier + distance] = weights[i];
      }
    }
    __syncthreads();
    // B in cuda/ptx.h: of a window's first 16 sources, and of the last 8 for two rows of taps at once.
    uint32_t bands[kKernel][kKernel][2], last_bands[kKernel][(kKernel + 1) / 2][2] = {};
#pragma unroll
    for (int j_d = 0; j_d < kKernel; ++j_d) {
#pragma unroll
      for (int j_h = 0; j_h < kKernel; ++j_h) {
        // Windows begin with a word.
        const int earlier = first_source(j_d - depth.padding, j_h - height.padding) & 1;
        const T* const line = table + (earlier * kKernel * kKernel + j_d * kKernel + j_h) * kTableRow;
        const uint32_t at = ptx::shared_address(line + (kStride * (kWindow - lane / 4) + lane % 4 * 2));
        bands[j_d][j_h][0] = ptx::load_shared<0>(at);
        bands[j_d][j_h][1] = ptx::load_shared<16>(at);
        last_bands[j_d][j_h / 2][j_h % 2] = ptx::load_shared<32>(at);
      }
    }

    int slot = 0;
    for (int z = first_z; z < end_z; ++z) {
      const int slots[2] = {slot, slot + 1 == kSlots ? 0 : slot + 1};
      const int free_slot = slots[1] + 1 == kSlots ? 0 : slots[1] + 1;
      if (z == first_z) wait_for_pair(slots[0]);
      wait_for_pair(slots[1]);
      if (in.clears) {
        if (z == first_z) clear_around_rows(z, slots[0]);
        clear_around_rows(z + 1, slots[1]);
      }
      __syncthreads();  // The next pair has arrived, and the one before has been read.
      if (z + 1 < end_z) copy_pair(z + 2, free_slot);
      slot = slots[1];

      for (int item = warp; item * 8 < in.places; item += warps) {
        if (in.places > 8 * warps) places = Places(in, ring, first_y, lane, item);
        float sum[2][2][4] = {};  // of a place's first row or second, and of its windows' first or last sources
#pragma unroll
        for (int j_d = 0; j_d < kKernel; ++j_d) {
          const int first = first_source(kStride * z - depth.padding + j_d, first_row) & (kVector - 1);
          // For rows that begin as the first one, and for the others: whether windows begin one source earlier.
          const int earlier[2] = {first & 1, (first ^ width.output) & 1};
          const uint32_t stage = slots[j_d / kStride] * in.slot_bytes + j_d % kStride * in.plane_bytes;
          uint32_t begin[2], first_within[2], last_within[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            begin[i] = stage + kElementBytes * (first - earlier[i]);
            first_within[i] = earlier[i] != 0 ? places.within[1][0] : places.within[0][0];
            last_within[i] = earlier[i] != 0 ? places.within[1][1] : places.within[0][1];
          }
#pragma unroll
          for (int rows = 0; rows < kKernel + kStride; rows += 2) {
            uint32_t a_last[4] = {};
#pragma unroll
            for (int row = rows; row < smaller(rows + 2, kKernel + kStride); ++row) {
              uint32_t a[4];
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                const int stage_row = row + m * kStride * 2;
                const uint32_t at = (stage_row < kPeriod ? places.from : places.from_next) +
                                    (begin[stage_row % 2] + stage_row * kElementBytes * width.output);
                a[m] = ptx::load_shared<0>(at) & first_within[stage_row % 2];
                a[m + 2] = ptx::load_shared<16>(at);
                a_last[row % 2 * 2 + m] = ptx::load_shared<32>(at) & last_within[stage_row % 2];
              }
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const int j_h = row - kStride * r;
                if (j_h >= 0 && j_h < kKernel) ptx::mma<T>(sum[r][0], a, bands[j_d][j_h]);
              }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int j_h = rows - kStride * r;
              if (j_h >= 0 && j_h < kKernel) ptx::mma<T>(sum[r][1], a_last, last_bands[j_d][j_h / 2]);
            }
          }
        }

        T* const to = in.destination + volume * in.destination_volume + z * height.input * width.input + places.to;
        Finiteness<T> finite;
        uint32_t words[kPlaceRows];
#pragma unroll
        for (int i = 0; i < kPlaceRows; ++i) {
          const int r = i % 2, m = i / 2;
          const float pair[2] = {sum[r][0][2 * m] + sum[r][1][2 * m], sum[r][0][2 * m + 1] + sum[r][1][2 * m + 1]};
          const Elements<T, 2> results = rounded<T>(pair);
          words[i] = *reinterpret_cast<const uint32_t*>(&results);
          finite.see(words[i]);
        }
        if (in.whole_words) {
#pragma unroll
          for (int i = 0; i < kPlaceRows; ++i) {
            ptx::store_global_if(i < places.live_rows, to + i * width.input, words[i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2 * kPlaceRows; ++i) {
            ptx::store_global_if(i / 2 < places.live_rows, to + i / 2 * width.input + i % 2,
                                 static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
          }
        }
        if (finite.all()) continue;
#pragma unroll 1
        for (int i = 0; i < kPlaceRows * 2; ++i) {
          if (i / 2 >= places.live_rows) break;
          const int at = places.to + i / 2 * width.input + i % 2, y = at / width.input;
          to[at - places.to] =
              static_cast<T>(gathered_alone(depth, height, width, source, weights, z, y, at - y * width.input));
        }
      }
    }
  }
}

// Places of a block.
constexpr int kBlockPlaces = 8 * kMostWarps;

}  // namespace

template <class T>
bool grad_input_by_bands(const Problem& problem, const Target& target, const T* grad_output, const T* weight,
                         T* grad_input, cudaStream_t stream) {
  if (target.compute_capability != 90 || problem.layout != Layout::ncdhw) return false;
  const Axis<int32_t> depth(problem, 0), height(problem, 1), width(problem, 2);
  if (depth.stride != kStride || height.stride != kStride || width.stride != kStride) return false;
  if (depth.dilation != 1 || height.dilation != 1) return false;
  if (depth.kernel != height.kernel || (depth.kernel != 3 && depth.kernel != 4)) return false;
  if (width.input < kWindow || width.padding > 7 || height.padding > 7) return false;
  // What the first source of a window's last destination's last tap is from a window that begins one earlier.
  if (1 + kStride * (kWindow - 1) + (width.kernel - 1) * width.dilation >= kReach) return false;
  CorrelatingArguments<T> in{depth, height, width, grad_output, weight, grad_input};
  in.channels = static_cast<int>(problem.in_channels);
  in.source_volume = problem.output_voxels();
  in.destination_volume = problem.input_voxels();
  in.windows = ceil_divide(width.input, kWindow);
  const int periods = ceil_divide(height.input, 2 * kPlaceRows);  // pairs of places below each other
  const int tile_periods = equal_share(periods, std::max(kBlockPlaces / (2 * in.windows), 1));
  in.tile_rows = 2 * kPlaceRows * tile_periods;
  in.tiles = ceil_divide(height.input, in.tile_rows);
  in.places = 2 * tile_periods * in.windows;
  in.stage_rows = kStride * in.tile_rows + height.kernel - kStride;
  // Of the columns behind a row's last, windows mask the last eight of their sources alone.
  if ((width.kernel - 1) * width.dilation + problem.output_padding[2] < width.padding + 1) return false;
  in.lift = width.output % 2 == 1 ? 0 : 16;
  in.turn = 32 * (((in.windows - width.output) % 4 + 3) % 4 + 1);
  in.run_rows = in.lift == 0 ? 2 * kPeriod : kPeriod;
  in.runs = ceil_divide(in.stage_rows, in.run_rows);
  const int64_t row_bytes = ceil_divide(int64_t{in.stage_rows} * kElementBytes * width.output, int64_t{16}) * 16;
  if (row_bytes > shared_memory_of_block(target, 1)) return false;
  in.plane_bytes = static_cast<int>(row_bytes) + in.left_out_before(in.stage_rows) + 32;
  in.slot_bytes = kStride * in.plane_bytes + 64;
  const int warps = ceil_divide(ceil_divide(in.places, 8), ceil_divide(in.places, 8 * kMostWarps));
  const int64_t shared_bytes = int64_t{kSlots} * (in.slot_bytes + kBarrierBytes) +
                               int64_t{2} * depth.kernel * height.kernel * kTableRow * kElementBytes;
  // Blocks of a multiprocessor, as registers and shared memory allow: plain multiplications need less of either, and
  // few warps hide no latencies.
  const int64_t resident =
      std::min<int64_t>(resident_blocks(depth.kernel) * kMostWarps / warps, blocks_that_share(target, shared_bytes));
  if (resident * warps < kLeastWarps) return false;
  in.steps = problem.batch * problem.in_channels * in.tiles * depth.input;
  constexpr int64_t kBegin = 3;  // planes that take as long as to begin a tile
  in.share = share_of_block(in.steps, depth.input, resident * target.parallelism, kBegin);
  in.whole_words = width.input % 2 == 0 && elements_past_vector(grad_input) % 2 == 0;
  in.clears = width.output % kVector != 0 || elements_past_vector(grad_output) != 0;
  in.by_windows = Divisor<int32_t>(in.windows);
  const dim3 grid(static_cast<unsigned>(ceil_divide(in.steps, in.share)));
  launch("depthwise correlation", depth.kernel == 3 ? correlate_by_bands<T, 3> : correlate_by_bands<T, 4>, grid,
         32 * warps, static_cast<size_t>(shared_bytes), stream, in);
  return true;
}

template bool grad_input_by_bands(const Problem&, const Target&, const __half*, const __half*, __half*, cudaStream_t);
template bool grad_input_by_bands(const Problem&, const Target&, const __nv_bfloat16*, const __nv_bfloat16*,
                                  __nv_bfloat16*, cudaStream_t);

}  // namespace convt3d::direct
