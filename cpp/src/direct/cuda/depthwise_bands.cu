// Forward of half types' depthwise layers on tensor cores, NCDHW.
//
// Sixteen neighbouring destinations of a row come from a window of sixteen neighbouring sources by a matrix of one row
// of taps that is the same for every window: zero beside a band along its diagonal. A warp multiplies the windows of 16
// places by it at once, once for each source row that a destination row meets. An eighth of these products count, but
// tensor cores have them to spare, and an element takes neither a conversion nor an instruction for each of its taps,
// which are what bounds plain multiplications: 64 channels, batch 2, 48^3 at kernel 4, stride 2 must move 0.26 GB, at
// least 0.060 ms on an H200, for 0.9 G multiplications, which with all that comes with them took 0.115 there, and take
// 0.081 so.
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
#include "direct/cuda/bands.h"
#include "direct/cuda/contacts.h"
#include "direct/cuda/rows.h"
#include "direct/shared_memory.h"

namespace convt3d::direct {
namespace {

constexpr int kWindow = 16;  // destinations of a window, and sources
constexpr int kOfLane = 4;   // destinations that a lane holds of a window, neighbours

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

constexpr int kStride = 2;  // along depth and height: destinations that share their sources
constexpr int kRuns = 2;    // one is filled while the other is stored

// Rows of destinations: whole sectors of 32 bytes, or whole words, or such that every other one begins between words.
enum class Rows { sectors, words, odd };

// What the kernels differ in, by the taps of a kernel along depth and height, 0 for any. A warp makes so many planes of
// a pair at once: of kernel 3, both planes' bands fit registers, and what has no taps is known.
CONVT3D_HOST_DEVICE constexpr int planes_of_warp(int taps) { return taps == 3 ? 2 : 1; }
CONVT3D_HOST_DEVICE constexpr int teams_of(int taps) { return kStride / planes_of_warp(taps); }
constexpr int most_warps(int taps) { return taps == 3 ? 5 : 8; }         // of a block
constexpr int resident_blocks(int taps) { return taps == 3 ? 4 : 2; }    // of a multiprocessor
constexpr int block_windows(int taps) { return taps == 3 ? 160 : 320; }  // of each plane and residue, about
CONVT3D_HOST_DEVICE constexpr int shifts_of(int taps) { return (taps + kStride - 1) / kStride; }

// Taps of a row by their distance from a window's destination to its source, with zeros around: from the first
// destination of a row that begins between words, and the last source, on.
CONVT3D_HOST_DEVICE constexpr int table_row(int stride) { return 1 + kWindow + (kWindow - 1) * stride; }

template <class T>
struct UpsamplingArguments : Axes {
  int first_source;  // column of window 0's first one
  const T* source;
  const T* weight;
  const T* bias;
  T* destination;
  int64_t source_volume, destination_volume;  // elements
  int plane_shifts, row_shifts;               // source planes and rows that a destination meets at most
  int first_q, rows;                          // of (row + padding) / 2
  int windows, window_step;                   // of a row, and sources from one to the next
  int tile_rows, tiles, plane_pairs;
  int steps, share;             // pairs of planes of all tiles, and those that a block makes
  int plane_rows, row_vectors;  // of shared memory: rows of a source plane, and what is copied of each
  int pitch, margin;            // elements from row to row, and before the band's first
  int plane_pitch, run_pitch;   // elements from plane to plane, of sources and of outputs
  bool whole_vectors;           // whether source rows are
  int places;                   // of a plane's rows, filled up to whole items
  int table_at, sources_at, places_at, copies_at;  // bytes before them in shared memory
  int table_row;                                   // elements
  Divisor<int32_t> by_kernel, by_windows, by_vectors, by_pairs, by_tiles, by_channels;
};

// The pairs of planes that a block makes of one tile.
struct Share {
  int volume, channel;
  int first_pair, end_pair;
  int first_q, rows;         // of (row + padding) / 2
  int row_begin, made_rows;  // destinations
  int before;                // rows that do not exist, as q begins with padding

  template <class T>
  __device__ Share(const UpsamplingArguments<T>& in, int step, int end_step) {
    const int tile = in.by_pairs.quotient(step);
    volume = in.by_tiles.quotient(tile);
    channel = volume - in.by_channels.quotient(volume) * in.by_channels.value;
    first_pair = step - tile * in.plane_pairs;
    end_pair = smaller(in.plane_pairs, first_pair + end_step - step);
    const int first_row = (tile - volume * in.tiles) * in.tile_rows;
    first_q = in.first_q + first_row;
    rows = smaller(in.tile_rows, in.rows - first_row);
    const int begin = kStride * first_q - in.height.padding;
    row_begin = larger(begin, 0);
    made_rows = smaller(begin + kStride * rows, in.height.output) - row_begin;
    before = row_begin - begin;
  }
};

// Which sources a vector of shared memory has: it begins `from` elements after its plane does.
struct Copy {
  int from;
  uint16_t to, inside;  // vectors; bits, one for each element that its row has
};

template <class T>
__device__ __forceinline__ void find_copies(const UpsamplingArguments<T>& in, int first_row, Copy* copies) {
  constexpr int kVector = 16 / sizeof(T);
  for (int i = static_cast<int>(threadIdx.x); i < in.plane_rows * in.row_vectors; i += static_cast<int>(blockDim.x)) {
    const int line = in.by_vectors.quotient(i), row = first_row + line, vector = i - line * in.row_vectors;
    const int column = in.first_source - in.margin + kVector * vector;
    // From the row's first column on, and up to its last.
    const int begin = smaller(larger(-column, 0), kVector), end = larger(smaller(in.width.input - column, kVector), 0);
    const unsigned bits = (1u << end) - 1 & ~((1u << begin) - 1);
    copies[i] = {row * in.width.input + column, static_cast<uint16_t>(line * in.pitch / kVector + vector),
                 static_cast<uint16_t>(inside(row, in.height.input) ? bits : 0)};
  }
}

// A plane of sources, with zeros around; behind the threads' backs where rows are whole vectors.
template <class T>
__device__ __forceinline__ void copy_plane(const UpsamplingArguments<T>& in, const Copy* copies, const T* volume,
                                           int plane, T* to) {
  constexpr int kVector = 16 / sizeof(T);
  const bool exists = inside(plane, in.depth.input);
  const T* const from = volume + plane * in.height.input * in.width.input;
  for (int i = static_cast<int>(threadIdx.x); i < in.plane_rows * in.row_vectors; i += static_cast<int>(blockDim.x)) {
    const Copy copy = copies[i];
    if (in.whole_vectors) {
      ptx::copy_vector(to + kVector * copy.to, from + copy.from, exists && copy.inside != 0);
    } else {
      Elements<T, kVector> all;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        all.element[e] = exists && (copy.inside >> e & 1) != 0 ? from[copy.from + e] : T(0.0f);
      }
      *reinterpret_cast<uint4*>(to + kVector * copy.to) = *reinterpret_cast<const uint4*>(&all);
    }
  }
  ptx::commit_copies();
}

// The table's rows of taps, and one of zeros.
template <class T>
__device__ __forceinline__ void clear_table(const UpsamplingArguments<T>& in, T* table) {
  const int elements = (in.depth.kernel * in.height.kernel + 1) * in.table_row;
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += static_cast<int>(blockDim.x)) table[i] = T(0.0f);
}
// A thread has the first weight that is its own already.
template <class T>
__device__ __forceinline__ void fill_table(const UpsamplingArguments<T>& in, const T* weights, T first, T* table) {
  const int zero_at = 1 + in.width.stride * (in.first_source + kWindow - 1) - in.width.padding;  // of distance 0
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < in.depth.kernel * in.height.kernel * in.width.kernel; i += static_cast<int>(blockDim.x)) {
    const int row = in.by_kernel.quotient(i), distance = (i - row * in.width.kernel) * in.width.dilation;
    table[row * in.table_row + zero_at + distance] = i == thread ? first : weights[i];
  }
}

// A lane's share of a band, from the lane's first element in a row of the table: of two matrices of eight columns, B in
// cuda/ptx.h, so that the lane gets the sums of neighbours.
template <class T>
__device__ __forceinline__ uint4 fragment_of(const T* first, int stride) {
  Elements<T, 8> all;
#pragma unroll
  for (int i = 0; i < 8; ++i) all.element[i] = first[i / 4 * 2 - stride * (i / 2 % 2 * 8 + i % 2)];
  return *reinterpret_cast<const uint4*>(&all);
}

// Of all shifts of planes and rows, p, r, and of rows that begin with a word, and between them.
template <int kVariants, class T>
__device__ __forceinline__ void make_bands(const UpsamplingArguments<T>& in, int plane_shifts, int row_shifts,
                                           const T* table, uint4* bands) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int kernel[2] = {in.depth.kernel, in.height.kernel}, stride = in.width.stride;
  const T* const of_lane = table + (1 + lane / 8 * kOfLane + lane / 4 % 2 + stride * (kWindow - 1 - lane % 4 * 2));
  for (int line = warp; line < plane_shifts * row_shifts * kStride * kStride;
       line += static_cast<int>(blockDim.x) / 32) {
    const int shift = line / (kStride * kStride), plane_shift = shift / row_shifts;
    const int j_d = kStride * plane_shift + line / kStride % kStride;
    const int j_h = kStride * (shift - plane_shift * row_shifts) + line % kStride;
    const int row = j_d < kernel[0] && j_h < kernel[1] ? j_d * kernel[1] + j_h : kernel[0] * kernel[1];
#pragma unroll
    for (int variant = 0; variant < kVariants; ++variant) {
      bands[(line * kVariants + variant) * 32 + lane] = fragment_of(of_lane + row * in.table_row - variant, stride);
    }
  }
}

// Where 16 windows of neighbouring places have their sources and destinations, unless these are whole sectors: found
// once, as it takes more instructions than their products.
struct Place {
  uint16_t from;  // bytes from the sources' begin to the place's window
  uint16_t to;    // bytes from the row before the block's first one
};

// The table of a tile's places, and of what each lane of a team stores of them, as bits, three for each plane and row:
// the first word, the second one, and an element alone.
template <class T, Rows kRows, int kPlanes>
__device__ __forceinline__ void find_places(const UpsamplingArguments<T>& in, const Share& share,
                                            const int (&odd)[kPlanes][kStride], int team, int member, int members,
                                            Place* place_table, uint16_t* store_table) {
  constexpr int kBytes = sizeof(T);
  for (int i = member * 32 + static_cast<int>(threadIdx.x) % 32; i < 4 * in.places; i += 32 * members) {
    const int place = i / 4, q = in.by_windows.quotient(place), window = place - q * in.windows;
    const int row = kStride * q - share.before, first_column = kWindow * window + i % 4 * kOfLane;
    if (team == 0 && i % 4 == 0) {
      place_table[place] = {
          static_cast<uint16_t>(smaller(q, share.rows - 1) * in.pitch * kBytes + window * in.window_step * kBytes),
          static_cast<uint16_t>(kBytes * ((row + 1) * in.width.output + first_column))};
    }
    // For a row that begins with a word, and for one that begins between them, a column earlier.
    int bits[2];
#pragma unroll
    for (int begins_odd = 0; begins_odd < 2; ++begins_odd) {
      const int column = first_column - begins_odd, last = in.width.output - 1;
      const bool alone = kRows == Rows::odd && (begins_odd != 0 ? column == -1 : last - column == last % kOfLane);
      bits[begins_odd] = (inside(column, last) ? 1 : 0) | (inside(column + 2, last) ? 2 : 0) | (alone ? 4 : 0);
    }
    int stores = 0;
#pragma unroll
    for (int j = 0; j < kPlanes * kStride; ++j) {
      const int p = j / kStride, r = j % kStride;
      if (inside(row + r, share.made_rows)) stores |= (odd[p][r] != 0 ? bits[1] : bits[0]) << 3 * j;
    }
    store_table[team * 4 * in.places + i] = static_cast<uint16_t>(stores);
  }
}

// With plane + padding = 2 * q + p, tap j of residue p = j % 2 reads source plane q - j / 2, and rows alike, so that a
// fragment of windows serves two planes and two rows of each. A block makes a tile's rows, pair of planes after pair:
// it has the source planes that a pair meets in shared memory, with zeros around them, and the next one is copied there
// meanwhile. A warp makes 16 windows of neighbouring places at once, in both rows and in one plane of the pair or both,
// of which a lane gets four neighbours. Rows that are whole sectors are stored at once, a window's 32 bytes by four
// lanes. Else the block puts them together in shared memory and stores them as the one run of memory that they are,
// while it makes the next; windows of a row that begins between words begin one element earlier. Blocks share out all
// tiles' pairs evenly, and are all there at once. kTaps is how many taps a kernel has along depth and height, or
// one less of an even number, and bands stay in registers; 0 takes any number, and reads bands from shared memory each
// time.
//
// Memory takes 120 cycles on an H200 for 1024 outputs, four schedulers some 80 for kernel 3's 320 instructions where
// rows are odd, and 90 at most for kernel 4's where they are sectors. Bound by latencies, next by memory: 16 warps a
// multiprocessor with kernel 4, and 20 with kernel 3, of whose time a third goes by waiting for the run before to be
// stored, and for each other.
template <class T, Rows kRows, int kTaps>
__global__ void __launch_bounds__(32 * most_warps(kTaps), resident_blocks(kTaps))
    upsample_by_bands(const __grid_constant__ UpsamplingArguments<T> in) {
  constexpr int kVector = 16 / sizeof(T), kVariants = kRows == Rows::odd ? 2 : 1, kBytes = sizeof(T);
  constexpr int kShifts = shifts_of(kTaps), kPlanes = planes_of_warp(kTaps), kTeams = teams_of(kTaps);
  CONVT3D_DYNAMIC_SHARED(16, shared);
  uint4* const bands = reinterpret_cast<uint4*>(shared);  // shift of planes, of rows, p, r, variant, lane
  T* const ring = reinterpret_cast<T*>(shared + in.sources_at);
  const int plane_shifts = kShifts > 0 ? kShifts : in.plane_shifts, row_shifts = kShifts > 0 ? kShifts : in.row_shifts;
  const int slots = plane_shifts + 1;
  // Bands that are kept in registers lie, with their table, where outputs do later.
  T* const runs = kShifts > 0 ? reinterpret_cast<T*>(shared) : ring + slots * in.plane_pitch;
  T* const table = reinterpret_cast<T*>(shared + in.table_at);
  Copy* const copies = reinterpret_cast<Copy*>(shared + in.copies_at);
  Place* const place_table = reinterpret_cast<Place*>(shared + in.places_at);
  uint16_t* const store_table = reinterpret_cast<uint16_t*>(place_table + in.places);  // of a team, place and lane
  const Axis<int32_t>&depth = in.depth, &height = in.height, &width = in.width;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int team = warp % kTeams, member = warp / kTeams, members = warps / kTeams;  // a team makes planes of its own
  const int row_bytes = kBytes * in.pitch, window_bytes = kBytes * in.window_step;
  const int plane_elements = height.output * width.output;
  const int taps = depth.kernel * height.kernel * width.kernel;

  int run = 0;
  for (int step = static_cast<int>(blockIdx.x) * in.share, end_step = smaller(step + in.share, in.steps);
       step < end_step;) {
    const Share share(in, step, end_step);
    step += share.end_pair - share.first_pair;
    const int before = share.before, made_rows = share.made_rows;
    const T* const source = in.source + share.volume * in.source_volume;
    const T* const weights = in.weight + static_cast<int64_t>(share.channel) * taps;
    const float bias = in.bias == nullptr ? 0 : static_cast<float>(in.bias[share.channel]);
    const int first_plane = depth.padding / kStride + share.first_pair;  // of q

    ptx::wait_for_bulk_stores<0>();
    __syncthreads();  // Shared memory has been read for the pairs before.
    find_copies(in, share.first_q - (row_shifts - 1), copies);
    clear_table(in, table);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < plane_shifts; ++i) {
      copy_plane(in, copies, source, first_plane - (plane_shifts - 1) + i, ring + i * in.plane_pitch);
    }
    const T weight = static_cast<int>(threadIdx.x) < taps ? weights[threadIdx.x] : T(0.0f);  // on its way meanwhile
    // Where the share's rows lie in its first plane, and what tells which bands are theirs: rows of a residue all begin
    // between words or with one.
    const int first_z = kStride * first_plane - depth.padding;
    T* const planes = in.destination + share.volume * in.destination_volume +
                      (static_cast<int64_t>(first_z) * plane_elements + share.row_begin * width.output);
    const int past_vector = elements_past_vector(planes);
    const auto is_odd = [&](int p, int r) {
      return kRows == Rows::odd ? (past_vector + p * plane_elements + r - before) & 1 : 0;
    };
    int odd[kPlanes][kStride];
    // Where rows begin between words, and where they end there: which of a lane's four elements is outside of whole
    // words.
    int lone[kPlanes][kStride];
    const uint4* band_of[kPlanes][kStride];
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
#pragma unroll
      for (int r = 0; r < kStride; ++r) {
        odd[i][r] = kRows == Rows::odd ? ptx::opaque(is_odd(team + i, r)) : 0;
        lone[i][r] = odd[i][r] != 0 ? 1 : (width.output - 1) % kOfLane;
        band_of[i][r] = bands + ((((team + i) * kStride + r) * kVariants + odd[i][r]) * 32 + lane);
      }
    }
    constexpr int kShiftsOfBoth = kShifts * kShifts, kEach = kShifts > 0 ? kShifts : 1,
                  kLine = kStride * kStride * kVariants * 32;
    // Which shifts have taps for which residues: known where a warp makes both planes; else bands may be zero.
    const auto has_taps = [](int shift, int p, int r) {
      return kPlanes == 1 || (kStride * (shift / kEach) + p < kTaps && kStride * (shift % kEach) + r < kTaps);
    };
    if constexpr (kRows != Rows::sectors) {
      find_places<T, kRows>(in, share, odd, team, member, members, place_table, store_table);
    }
    fill_table(in, weights, weight, table);
    __syncthreads();
    make_bands<kVariants>(in, plane_shifts, row_shifts, table, bands);
    __syncthreads();
    uint4 kept[kEach * kEach][kPlanes][kStride];
#pragma unroll
    for (int shift = 0; shift < kShiftsOfBoth; ++shift) {
#pragma unroll
      for (int i = 0; i < kPlanes * kStride; ++i) {
        const int p = i / kStride, r = i % kStride;
        if (has_taps(shift, p, r)) kept[shift][p][r] = band_of[p][r][shift * kLine];
      }
    }

    ptx::wait_for_copies<0>();
    __syncthreads();  // The first planes have arrived, and the places.

    const int items = (share.rows * in.windows + 15) / 16;
    int newest = plane_shifts - 1;  // slot
    for (int pair = 0; pair < share.end_pair - share.first_pair; ++pair) {
      const int z = first_z + kStride * pair;
      const auto exists = [&](int p) { return inside(z + p, depth.output); };
      T* const pair_planes = planes + static_cast<int64_t>(kStride * pair) * plane_elements;
      // Where the block makes a plane's rows, between vectors as in the volume.
      const auto made_at = [&](int p) {
        if constexpr (kRows == Rows::sectors) {
          return pair_planes + p * plane_elements;
        } else {
          const int past = (past_vector + (kStride * pair + p) * plane_elements) & (kVector - 1);
          return runs + (run * kStride + p) * in.run_pitch + past;
        }
      };
      const int next = newest + 1 == slots ? 0 : newest + 1;
      if (share.first_pair + pair + 1 < share.end_pair) {
        copy_plane(in, copies, source, first_plane + pair + 1, ring + next * in.plane_pitch);
      }
      // Where a lane's sources of window 0 lie in the first of its rows, `shift` planes before the newest.
      const auto sources_of = [&](int shift) {
        const int slot = newest - shift + (newest < shift ? slots : 0);
        return ptx::shared_address(ring + slot * in.plane_pitch + in.margin + lane % 4 * 2) +
               (row_shifts - 1) * row_bytes;
      };
      uint32_t sources[kEach];
#pragma unroll
      for (int i = 0; i < kShifts; ++i) sources[i] = sources_of(i);
      T* made[kPlanes];
      uint32_t made_before[kPlanes][kStride];
      bool any_exists = false;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        any_exists = any_exists || exists(team + p);
        made[p] = made_at(team + p);
        if (kRows == Rows::sectors) made[p] = ptx::opaque_global(made[p]);
#pragma unroll
        for (int r = 0; r < kStride; ++r) {
          if (kRows == Rows::sectors) continue;
          made_before[p][r] =
              ptx::shared_address(made[p] + lane % 4 * kOfLane) + kBytes * ((r - 1) * width.output - odd[p][r]);
        }
      }

      for (int item = any_exists ? member : items; item < items; item += members) {
        // A lane's places are windows lane / 4 of each eight. Those behind the last read the last row's sources.
        int place_row[2], place_column[2];   // from row_begin on
        uint32_t from[2], to[2], stores[2];  // in shared memory
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int place = item * 16 + 8 * m + lane / 4;
          if constexpr (kRows == Rows::sectors) {
            const int q = in.by_windows.quotient(place), window = place - q * in.windows;
            place_row[m] = kStride * q - before;
            place_column[m] = kWindow * window + lane % 4 * kOfLane;
            from[m] = smaller(q, share.rows - 1) * row_bytes + window * window_bytes;
          } else {
            const uint32_t both = reinterpret_cast<const uint32_t*>(place_table)[place];
            from[m] = both & 0xffff;
            to[m] = both >> 16;
            stores[m] = store_table[team * 4 * in.places + (item * 16 + 8 * m) * 4 + lane];
          }
        }
        float sum[kPlanes][kStride][2][4] = {};
        const auto add_products = [&](int shift, uint32_t plane, int row_shift,
                                      const uint4(&fragments)[kPlanes][kStride]) {
          uint32_t a[4];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t at = from[m] + plane - row_shift * row_bytes;
            a[m] = ptx::load_shared<0>(at);
            a[m + 2] = ptx::load_shared<16>(at);
          }
#pragma unroll
          for (int i = 0; i < kPlanes * kStride; ++i) {
            const int p = i / kStride, r = i % kStride;
            if (!has_taps(shift, p, r)) continue;
            const uint4& fragment = fragments[p][r];
            const uint32_t b[2][2] = {{fragment.x, fragment.y}, {fragment.z, fragment.w}};
#pragma unroll
            for (int half = 0; half < 2; ++half) ptx::mma<T>(sum[p][r][half], a, b[half]);
          }
        };
        if constexpr (kShifts > 0) {
#pragma unroll
          for (int i = 0; i < kShiftsOfBoth; ++i) add_products(i, sources[i / kShifts], i % kShifts, kept[i]);
        } else {
          int line = 0;
          for (int plane_shift = 0; plane_shift < plane_shifts; ++plane_shift) {
            const uint32_t plane = sources_of(plane_shift);
            for (int row_shift = 0; row_shift < row_shifts; ++row_shift, line += kLine) {
              const uint4 fragments[1][kStride] = {{band_of[0][0][line], band_of[0][1][line]}};
              add_products(0, plane, row_shift, fragments);
            }
          }
        }

        if (in.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < kPlanes * kStride * 8; ++i) sum[i / 16][i / 8 % 2][i / 4 % 2][i % 4] += bias;
        }
        Finiteness<T> finite;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int place_at = kRows == Rows::sectors ? place_row[m] * width.output + place_column[m] : 0;
#pragma unroll
          for (int j = 0; j < kPlanes * kStride; ++j) {
            const int p = j / kStride, r = j % kStride;
            const uint2 words = words_of<T>(sum[p][r], m);
            finite.see(words.x);
            finite.see(words.y);
            if constexpr (kRows == Rows::sectors) {
              T* const at = made[p] + (place_at + r * width.output);
              if (inside(place_row[m] + r, made_rows) && (kPlanes == 1 || exists(p))) {
                *reinterpret_cast<uint64_t*>(at) = uint64_t{words.y} << 32 | words.x;
              }
            } else {
              const uint32_t at = to[m] + made_before[p][r];
              ptx::store_shared_if_any(stores[m] & 1 << 3 * j, at, words.x);
              ptx::store_shared_if_any(stores[m] & 2 << 3 * j, at + 4, words.y);
              if constexpr (kRows == Rows::odd) {
                const uint32_t element = __byte_perm(words.x, words.y, 0x1010 + 0x2222 * lone[p][r]);
                ptx::store_shared_if_any(stores[m] & 4 << 3 * j, at + 2 * lone[p][r], static_cast<uint16_t>(element));
              }
            }
          }
        }
        if (finite.all()) continue;
#pragma unroll 1
        for (int i = 0; i < kPlanes * kStride * 2 * kOfLane; ++i) {
          const int e = i % kOfLane, m = i / kOfLane % 2, r = i / kOfLane / 2 % kStride;
          const int p = team + i / kOfLane / 2 / kStride;
          const int place = item * 16 + 8 * m + lane / 4, q = in.by_windows.quotient(place),
                    row = kStride * q + r - before;
          const int column = kWindow * (place - q * in.windows) + lane % 4 * kOfLane - is_odd(p, r) + e;
          if (!exists(p) || !inside(row, made_rows) || !inside(column, width.output)) continue;
          made_at(p)[row * width.output + column] =
              static_cast<T>(bias + gathered_alone(in, source, weights, z + p, share.row_begin + row, column));
        }
      }

      newest = next;
      ptx::wait_for_copies<0>();
      if constexpr (kRows != Rows::sectors) {
        ptx::fence_shared_for_wgmma();
        ptx::wait_for_bulk_stores<0>();
      }
      __syncthreads();  // The pair has been made, and the one before it stored; the next plane has arrived.
      if constexpr (kRows != Rows::sectors) {
#pragma unroll
        for (int p = 0; p < kStride; ++p) {
          // By the last warps, which have the fewest places.
          const int by = larger(warps - 1 - p, 0);
          if (exists(p)) store_run_in_bulk(pair_planes + p * plane_elements, made_at(p), made_rows * width.output, by);
        }
        run ^= 1;
      }
    }
  }
  ptx::wait_for_bulk_stores<0>();  // Shared memory is to last that long.
}

// What a tile's rows take of shared memory.
template <class T>
struct SharedMemory {
  int64_t bands, table, plane, run, places, copies;  // bytes
  int slots;
  bool kept;  // whether bands are, so that outputs lie there later

  SharedMemory(const UpsamplingArguments<T>& in, Rows rows, int taps)
      : slots(in.plane_shifts + 1), kept(shifts_of(taps) > 0) {
    constexpr int kBytes = sizeof(T);
    const int variants = rows == Rows::odd ? 2 : 1;
    bands = int64_t{variants} * in.plane_shifts * in.row_shifts * kStride * kStride * 32 * sizeof(uint4);
    table = int64_t{16} * ceil_divide((in.depth.kernel * in.height.kernel + 1) * in.table_row * kBytes, 16);
    plane = int64_t{in.plane_pitch} * kBytes;
    run = rows == Rows::sectors ? 0 : int64_t{kStride} * in.run_pitch * kBytes;
    copies = int64_t{in.plane_rows} * in.row_vectors * sizeof(Copy);
    places = rows == Rows::sectors
                 ? 0
                 : in.places * static_cast<int64_t>(sizeof(Place) + teams_of(taps) * 4 * sizeof(uint16_t));
  }
  int64_t before_sources() const { return kept ? std::max(bands + table, kRuns * run) : bands + table; }
  int64_t before_places() const { return before_sources() + slots * plane + (kept ? 0 : kRuns * run); }
  int64_t bytes() const { return before_places() + places + copies; }
};

template <class T, Rows kRows>
auto kernel_for(int taps) {
  switch (taps) {
    case 2:
      return upsample_by_bands<T, kRows, 2>;
    case 3:
      return upsample_by_bands<T, kRows, 3>;
    case 4:
      return upsample_by_bands<T, kRows, 4>;
    default:
      return upsample_by_bands<T, kRows, 0>;
  }
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
  UpsamplingArguments<T> in{axes};
  in.source = source;
  in.weight = weight;
  in.bias = bias;
  in.destination = destination;
  const Axis<int32_t>&depth = axes.depth, &height = axes.height, &width = axes.width;
  if (width.output < kOfLane) return false;
  const Rows rows = width.output % 2 == 1                                                               ? Rows::odd
                    : width.output % kWindow == 0 && reinterpret_cast<uintptr_t>(destination) % 32 == 0 ? Rows::sectors
                                                                                                        : Rows::words;
  if (rows == Rows::words && elements_past_vector(destination) % 2 == 1) return false;
  const int variants = rows == Rows::odd ? 2 : 1;
  // The sources that meet a window's first and last destination, of either variant; windows begin with words where rows
  // do.
  const int lowest = width.padding - (variants - 1) - (width.kernel - 1) * width.dilation;
  in.first_source = floor_divide(floor_divide(lowest, width.stride), 2) * 2;
  if (floor_divide(kWindow - 1 + width.padding, width.stride) >= in.first_source + kWindow) return false;
  in.source_volume = problem.input_voxels();
  in.destination_volume = problem.output_voxels();
  in.plane_shifts = ceil_divide(depth.kernel, kStride);
  in.row_shifts = ceil_divide(height.kernel, kStride);
  in.first_q = height.padding / kStride;
  in.rows = ceil_divide(height.output + height.padding % kStride, kStride);
  in.windows = ceil_divide(width.output + variants - 1, kWindow);
  in.window_step = kWindow / width.stride;
  in.table_row = table_row(width.stride);
  in.plane_pairs = ceil_divide(depth.output + depth.padding % kStride, kStride);
  in.margin = in.first_source - floor_divide(in.first_source, kVector) * kVector;
  in.row_vectors = ceil_divide(in.margin + in.window_step * (in.windows - 1) + kWindow, kVector);
  // Eight windows take every bank of shared memory once, wherever one row ends and the next begins.
  const int banks = 8 * in.window_step, needed = in.row_vectors * kVector;
  in.pitch = needed + ((in.window_step * in.windows - needed) % banks + banks) % banks / kVector * kVector;
  in.whole_vectors = width.input % kVector == 0 && elements_past_vector(source) == 0;
  const bool alike = in.plane_shifts == in.row_shifts && in.plane_shifts <= 2;
  const int taps = !alike ? 0 : std::max(depth.kernel, height.kernel) == 3 ? 3 : kStride * in.plane_shifts;
  const auto cut_to = [&](int tile_rows) {
    in.tile_rows = equal_share(in.rows, std::max(tile_rows, 1));
    in.plane_rows = in.tile_rows + in.row_shifts - 1;
    in.plane_pitch = in.plane_rows * in.pitch;
    in.run_pitch = (ceil_divide(kStride * in.tile_rows * width.output, kVector) + 2) * kVector;
    in.places = ceil_divide(in.tile_rows * in.windows, 16) * 16;
    return SharedMemory<T>(in, rows, taps);
  };
  SharedMemory<T> memory = cut_to(block_windows(taps) / in.windows);
  while (in.tile_rows > 1 && memory.bytes() > shared_memory_of_block(target, resident_blocks(taps))) {
    memory = cut_to(in.tile_rows / 2);
  }
  // What 16 bits count.
  constexpr int64_t kMostBytes = 1 << 16;
  if (memory.bytes() > shared_memory_of_block(target, 1) || memory.plane > kMostBytes ||
      memory.run + 2 * kStride * static_cast<int64_t>(sizeof(T)) * width.output > kMostBytes) {
    return false;
  }
  in.tiles = ceil_divide(in.rows, in.tile_rows);
  in.table_at = static_cast<int>(memory.bands);
  in.sources_at = static_cast<int>(memory.before_sources());
  in.places_at = static_cast<int>(memory.before_places());
  in.copies_at = static_cast<int>(memory.before_places() + memory.places);
  const int teams = teams_of(taps), items = in.places / 16;
  const int warps = teams * ceil_divide(items, ceil_divide(items, most_warps(taps) / teams));
  const int64_t resident =
      std::min<int64_t>(resident_blocks(taps) * most_warps(taps) / warps, blocks_that_share(target, memory.bytes()));
  constexpr int64_t kBegin = 1;  // pairs that take as long as to begin a tile
  const int64_t steps = problem.batch * problem.in_channels * in.tiles * in.plane_pairs;
  const int64_t share = share_of_block(steps, in.plane_pairs, resident * target.parallelism, kBegin);
  if (steps + share > std::numeric_limits<int32_t>::max()) return false;
  in.steps = static_cast<int>(steps);
  in.share = static_cast<int>(share);
  in.by_pairs = Divisor<int32_t>(in.plane_pairs);
  in.by_tiles = Divisor<int32_t>(in.tiles);
  in.by_channels = Divisor<int32_t>(problem.in_channels);
  in.by_kernel = Divisor<int32_t>(width.kernel);
  in.by_windows = Divisor<int32_t>(in.windows);
  in.by_vectors = Divisor<int32_t>(in.row_vectors);
  const auto kernel = rows == Rows::odd       ? kernel_for<T, Rows::odd>(taps)
                      : rows == Rows::sectors ? kernel_for<T, Rows::sectors>(taps)
                                              : kernel_for<T, Rows::words>(taps);
  const dim3 grid(static_cast<unsigned>(ceil_divide(in.steps, in.share)));
  launch("depthwise upsampling", kernel, grid, 32 * warps, static_cast<size_t>(memory.bytes()), stream, in);
  return true;
}

template bool forward_by_bands(const Problem&, const Target&, const __half*, const __half*, const __half*, __half*,
                               cudaStream_t);
template bool forward_by_bands(const Problem&, const Target&, const __nv_bfloat16*, const __nv_bfloat16*,
                               const __nv_bfloat16*, __nv_bfloat16*, cudaStream_t);

}  // namespace convt3d::direct
