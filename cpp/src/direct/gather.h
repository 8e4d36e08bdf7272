// Forward and grad_input as one computation. Along each axis, destination position S * q + r (0 <= r < S) sums over
// contacts, each a tap and the source position M * q + offset; a contact belongs to the residue r alone, and not to q:
//   forward, from x to y:       S = stride, M = 1,  offset = (r + padding - tap * dilation) / stride
//   grad_input, from gy to gx:  S = 1, M = stride,  offset = tap * dilation - padding
// Forward's contacts are the taps for which that division leaves nothing over.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "convt3d/convt3d.h"
#include "geometry.h"

namespace convt3d::direct {

struct Contact {
  int64_t tap, offset;
};

struct GatherAxis {
  int64_t destination = 1, source = 1;                // positions
  int64_t destination_stride = 1, source_stride = 1;  // S and M
  int64_t source_step = 1, source_origin = 0;         // source positions are origin + step * (M * q + offset)
  std::vector<std::vector<Contact>> residues;         // S lists, by ascending offset

  // `fold` neighbouring positions q count as one, with as many times the residues: S and M are `fold` times as large.
  GatherAxis(const Problem& problem, Operator op, int axis, int64_t fold = 1);
  // Leaves out the source positions that no contact reaches, as where stride and dilation have a factor in common.
  void thin();
  // Of residues [first, first + count): the distinct offsets of their contacts, ascending.
  std::vector<int64_t> offsets(int64_t first, int64_t count) const;
  // The tap that a residue has at an offset, or -1.
  int64_t tap_at(int64_t residue, int64_t offset) const;
  int64_t positions() const { return (destination + destination_stride - 1) / destination_stride; }  // of q
};

// Terms of the longest sums.
inline int64_t most_terms(const Problem& problem, Operator op) {
  return problem.taps() * (op == Operator::forward ? problem.group_in_channels() : problem.group_out_channels());
}
// Destination positions that have different taps; the average of them has as many times fewer terms.
inline int64_t phases_of(const Problem& problem, Operator op) {
  return op == Operator::forward ? problem.stride[0] * problem.stride[1] * problem.stride[2] : 1;
}

// What both tensor-core gathers ask of a problem, and how they cut it.
constexpr int64_t kGatherLimit = std::numeric_limits<int32_t>::max() / 2;
inline int64_t gather_element_bytes(const Problem& problem) { return problem.dtype == DataType::float32 ? 4 : 2; }
// Positions that a stage of the source holds at most, of 32 bytes and more.
constexpr int64_t kMostStagePositions = 1 << 16;
// Whether they take the type, and offsets inside a sample can be counted in 32 bits.
bool suits_tensor_gather(const Problem& problem);
// Extents of a tile that are worth trying: even pieces, and powers of two.
std::vector<int64_t> tile_extents(int64_t extent, int64_t most);

// The gather on tensor cores is an implicit matrix product. A block of threads makes a tile of positions q, for one
// block of residues ("slots") and one block of destination channels ("columns"), in sums that stay in registers. It
// walks through stages: 32 * k_steps bytes of source channels, from the source planes of one depth offset, with the
// weights of all contacts at that depth. A stage is a list of steps: one offset along height and width, whose window of
// the source is loaded once and multiplied for every slot that has a tap there.
constexpr int kMaximumSlots = 4;

struct GatherStep {
  int32_t shift = 0;                  // from a position's own place in the stage's source to the step's, in bytes
  uint32_t slots = 0;                 // those that have a tap here, as bits
  uint16_t weights[kMaximumSlots]{};  // where each slot's tap begins in the stage's weights, in 16 bytes
};

struct GatherStage {
  int32_t depth_offset = 0;  // of the source planes
  uint16_t first_step = 0, steps = 0;
  uint16_t first_tap = 0, taps = 0;  // of the packed weights
};

// The residues that one block of threads makes: `slots` of them along each axis, from `residue` upwards.
struct PhaseBlock {
  uint16_t first_stage = 0, stages = 0;
  int16_t residue[3]{};
  int32_t origin[2]{};  // the lowest offset along height and width
};

// How a kernel's source gets to shared memory, and to products from there: gathered by warps that load it, or
// multiplied in place; of pipelined kernels alone copied in bulk, as runs of channels or as boxes of the volume, see
// there.
enum class SourceForm : uint8_t { gathered, in_place, copied, boxed };

// What a kernel's steps are: those of a list, or, of pipelined kernels alone, all alike and in the kernel's code, see
// StepPattern there.
enum class Pattern : uint8_t { listed, windows, cubes, points };

// The kernels that there are: sums for `slots` residues by `columns` channels by 16 * row_blocks positions, in
// slots * columns * row_blocks / 2 registers of a thread. The exact ones, float32 as three products of TF32, which are
// folded into sums of their own, have twice as many.
struct GatherConfiguration {
  int slots, columns, row_blocks;
  bool exact;
  SourceForm form = SourceForm::gathered;
  Pattern pattern = Pattern::listed;

  constexpr bool operator==(const GatherConfiguration& other) const {
    return slots == other.slots && columns == other.columns && row_blocks == other.row_blocks && exact == other.exact &&
           form == other.form && pattern == other.pattern;
  }
};
inline constexpr GatherConfiguration kTensorGathers[] = {
    {1, 8, 1, false}, {1, 16, 1, false}, {1, 24, 1, false}, {1, 32, 1, false}, {1, 48, 1, false}, {1, 64, 1, false},
    {1, 8, 2, false}, {1, 16, 2, false}, {1, 24, 2, false}, {1, 32, 2, false}, {1, 48, 2, false}, {1, 64, 2, false},
    {2, 8, 2, false}, {2, 16, 2, false}, {2, 24, 1, false}, {2, 32, 1, false}, {2, 48, 1, false}, {2, 64, 1, false},
    {4, 8, 1, false}, {4, 8, 2, false},  {4, 16, 1, false}, {4, 24, 1, false}, {4, 32, 1, false}, {1, 8, 1, true},
    {1, 16, 1, true}, {1, 24, 1, true},  {1, 32, 1, true},  {1, 48, 1, true},  {1, 64, 1, true},  {2, 8, 1, true},
    {2, 16, 1, true}, {2, 24, 1, true},  {2, 32, 1, true},  {4, 8, 1, true},   {4, 16, 1, true},
};

// 16-byte pieces of the source that a thread may load ahead for the next stage, in 24 registers: four each, but a half
// type's channels take one each until they have all arrived.
constexpr int most_units(int64_t element_bytes) { return element_bytes == 4 ? 6 : 3; }

constexpr int kMaximumSteps = 352;  // 7 * 7 * 7 taps, and a little more
constexpr int kMaximumStages = 96;
constexpr int kMaximumPhaseBlocks = 32;

// Passed to the kernels by value, so that nothing has to be copied to the device beforehand.
struct GatherTables {
  GatherStep steps[kMaximumSteps];
  GatherStage stages[kMaximumStages];
  PhaseBlock phases[kMaximumPhaseBlocks];
};

struct TensorGather {
  // Which kernel: an entry of kTensorGathers for 32 * k_steps bytes of channels at a time, on so many warpgroups.
  int slots = 1, columns = 8, row_blocks = 1, k_steps = 1, warpgroups = 2;
  bool exact = false;

  int slot_bits[3] = {0, 0, 0};    // logarithms of the slots along each axis
  int slot_extent[3] = {1, 1, 1};  // slots along each axis
  int phase_blocks = 1, column_blocks = 1, channel_blocks = 1;
  int channel_groups = 1;   // a stage holds so many times 32 * k_steps bytes of source channels
  int samples = 1;          // of the batch, in one tile
  int tile[3] = {1, 1, 1};  // positions q
  int64_t tiles[3] = {1, 1, 1};
  int rows = 1, row_pitch = 1;  // of a source plane in shared memory, and positions in a row
  int residue_pitch = 1;        // a row holds source positions by their residue modulo M, this far apart
  int source_stride[3] = {1, 1, 1}, destination_stride[3] = {1, 1, 1};
  int source_positions = 1;  // in shared memory, of a stage
  int units = 1;             // 16-byte pieces of a stage's source that each thread loads, at most
  int64_t taps = 1;
  int64_t weight_stage_bytes = 0, source_stage_bytes = 0, shared_bytes = 0;
  int64_t packed_bytes = 0;  // of the weights, in the order in which the kernel takes them
  // Divisors of the kernels' index arithmetic.
  Divisor<int32_t> by_columns, by_phases, by_groups, by_tiles[3], by_tile[3], by_source_positions, by_row_pitch,
      by_rows, by_residue_pitch, by_sample_planes;
  GatherTables tables;
  uint16_t tap_order[kMaximumSteps]{};  // the packed weights' taps
  int64_t blocks = 0;                   // of threads, all in all

  int parts() const { return exact ? 3 : 1; }
  int stage_k_steps() const { return k_steps * channel_groups; }
  int positions() const { return 64 * warpgroups * row_blocks; }
};

// How the tensor-core kernel takes the problem, and the clock cycles that this is expected to take; or nothing where it
// doesn't.
std::optional<double> cut_tensor_gather(const Problem& problem, Operator op, const Target& target,
                                        TensorGather& gather);

}  // namespace convt3d::direct
