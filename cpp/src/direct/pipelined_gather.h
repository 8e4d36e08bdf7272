// The gather (see direct/gather.h) for GPUs of compute capability 9.0: an implicit matrix product in which some warps
// load while others multiply, on blocks of threads that stay for many tiles.
//
// A tile is a set of positions q, one block of residues ("slots") and one block of destination channels ("columns").
// It sums over stages of the source, each 32 * channel_groups bytes of channels of every source voxel that the tile
// needs, and in each over steps: one offset of the source and 32 bytes of its channels, multiplied for every slot that
// has a tap there. Where the source has a stride, as in grad_input, a stage may hold one residue of it alone: then a
// tile goes through all its channels once for each, in "passes", and needs the fewer voxels at a time. The weights of
// a stage's steps come in pieces of their own. Where columns are few, one product makes those of several neighbouring
// slots, a "band" of them; weights are zero where one of these has no tap. Rows of the destination that no tap reaches
// are in no tile.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "convt3d/convt3d.h"
#include "direct/gather.h"
#include "geometry.h"

namespace convt3d::direct {

// The kernels that there are: sums for `slots` residues by `columns` channels by 64 * row_blocks positions, in
// slots * columns * row_blocks / 2 registers of a thread; the exact ones have twice as many. Those in place multiply
// the source where it lies in shared memory, 64 positions in eights of neighbours along the width that are equally far
// apart; the others have loaded it from there to registers, any positions once for all slots. In NCDHW some have copied
// it in bulk: half types where all taps of a tile read the same positions, whose voxels are one run of each channel,
// and floats that TF32 takes as boxes of the volume, zeros beyond it included. The last ones have a step's pattern in
// their code.
inline constexpr GatherConfiguration kPipelinedGathers[] = {
    {1, 8, 2, false},
    {1, 16, 2, false},
    {1, 32, 2, false},
    {1, 64, 2, false},
    {1, 128, 2, false},
    {2, 16, 2, false},
    {2, 32, 2, false},
    {2, 48, 2, false},
    {2, 64, 2, false},
    {4, 8, 2, false},
    {4, 16, 2, false},
    {4, 24, 2, false},
    {4, 32, 2, false},
    {4, 48, 1, false},
    {8, 8, 2, false},
    {8, 16, 2, false},
    {8, 24, 1, false},
    {8, 32, 1, false},

    {1, 16, 2, true},
    {1, 32, 2, true},
    {1, 64, 2, true},
    {2, 32, 2, true},
    {4, 8, 2, true},
    {4, 16, 2, true},
    {4, 32, 1, true},
    {8, 8, 2, true},
    {8, 16, 1, true},

    {1, 64, 2, false, SourceForm::in_place},
    {1, 128, 2, false, SourceForm::in_place},
    {2, 48, 2, false, SourceForm::in_place},

    {4, 32, 2, false, SourceForm::copied},
    {8, 16, 2, false, SourceForm::copied},
    {8, 32, 1, false, SourceForm::copied},

    {1, 128, 2, false, SourceForm::boxed},
    {2, 64, 2, false, SourceForm::boxed},
    {4, 32, 2, false, SourceForm::boxed},
    {8, 8, 2, false, SourceForm::boxed},
    {8, 16, 2, false, SourceForm::boxed},
    {8, 32, 1, false, SourceForm::boxed},

    {4, 32, 1, false, SourceForm::gathered, Pattern::windows},
    {4, 48, 1, false, SourceForm::gathered, Pattern::windows},
    {4, 64, 1, false, SourceForm::gathered, Pattern::windows},
    {8, 24, 1, false, SourceForm::gathered, Pattern::windows},

    {8, 32, 1, false, SourceForm::gathered, Pattern::cubes},
    {8, 32, 1, false, SourceForm::boxed, Pattern::cubes},

    {8, 24, 1, false, SourceForm::boxed, Pattern::points},
    {8, 32, 1, false, SourceForm::boxed, Pattern::points},
};

// Slots in a band. A product of 8 or 16 columns takes about as long as one of 32.
constexpr CONVT3D_HOST_DEVICE int band_slots(const GatherConfiguration& configuration) {
  int band = 1;
  if (configuration.pattern != Pattern::listed) return band;
  while (2 * band <= configuration.slots && band * configuration.columns < 32) band *= 2;
  return band;
}

// A step that a kernel has in its code: parts of the source, each of which is loaded once and multiplied for all slots
// that have a tap there, by units of the weights in an order of the pattern's own.
//   windows: slots are neighbouring planes with three taps along the depth, each slot's one plane further on, and share
//     their units. Parts are planes, at one offset along height and width.
//   cubes: slots are the residues of stride 2 along each axis, of which the first has one tap, and the second another
//     there and one at the next offset. Parts are 2 x 2 x 2 neighbours; bits of slots and parts are their places.
//   points: slots have one tap each, all of them at the same offset, as where kernel = stride. Parts are what a stage
//     has there, in groups of 32 bytes of channels. For a block's only tile, which leaves from registers.
struct StepPattern {
  Pattern pattern;
  int slots;

  constexpr CONVT3D_HOST_DEVICE explicit StepPattern(const GatherConfiguration& configuration)
      : pattern(configuration.pattern), slots(configuration.slots) {}
  constexpr CONVT3D_HOST_DEVICE bool is_windows() const { return pattern == Pattern::windows; }
  constexpr CONVT3D_HOST_DEVICE bool is_points() const { return pattern == Pattern::points; }
  constexpr CONVT3D_HOST_DEVICE int units() const { return is_windows() ? 3 : is_points() ? parts() * slots : 27; }
  constexpr CONVT3D_HOST_DEVICE int parts() const {
    return is_windows() ? slots + 2 : is_points() ? channel_groups() : 8;
  }
  // That a step has; with points a stage has no more.
  constexpr CONVT3D_HOST_DEVICE int channel_groups() const { return is_points() ? 4 : 1; }
  constexpr CONVT3D_HOST_DEVICE bool has(int part, int slot) const {
    return is_windows() ? slot <= part && part <= slot + 2 : is_points() || (slot & part) == part;
  }
  // Of cubes, a digit to base 3 for each axis: 0 for the first residue's tap, 1 and 2 for the second one's.
  constexpr CONVT3D_HOST_DEVICE int unit(int part, int slot) const {
    return is_windows()  ? part - slot
           : is_points() ? part * slots + slot
                         : 9 * ((part >> 2 & 1) + (slot >> 2 & 1)) + 3 * ((part >> 1 & 1) + (slot >> 1 & 1)) +
                               (part & 1) + (slot & 1);
  }
  // From the step's own place to a part's, by what lies between planes, rows, voxels and groups of channels.
  constexpr CONVT3D_HOST_DEVICE int shift(int part, int plane, int row, int voxel, int group) const {
    return is_windows()  ? part * plane
           : is_points() ? part * group
                         : (part >> 2 & 1) * plane + (part >> 1 & 1) * row + (part & 1) * voxel;
  }
};

// The sets of bands, as bits, that a step may have taps for. Two bands or one along each axis, or a window of them.
inline constexpr uint8_t kSetsOf1[] = {1};
inline constexpr uint8_t kSetsOf2[] = {1, 2, 3};
inline constexpr uint8_t kSetsOf4[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline constexpr uint8_t kSetsOf8[] = {1,  2,   4,  8,   16, 32,  64, 128, 3,   12, 48, 192, 5,  10,  80,  160, 17, 34,
                                       68, 136, 15, 240, 51, 204, 85, 170, 255, 7,  14, 28,  56, 112, 224, 6,   24, 96};

// Registers of a thread that hold sums; the exact kernels' have twice as many.
constexpr CONVT3D_HOST_DEVICE int sums_of_thread(const GatherConfiguration& configuration) {
  return configuration.slots * configuration.columns * configuration.row_blocks / 2;
}

// Warpgroups that load for two that multiply. Loading is bound by instructions that wait for each other, so that more
// warps help where much is loaded for each product, as in grad_input with a stride, which one slot serves, and where
// columns are few; if sums leave them registers. kb73's grad_input takes 0.84 ms with four, 1.14 with two; kb58 and
// kb68, of two slots, 5 and 8 % more with three.
constexpr CONVT3D_HOST_DEVICE int loading_warpgroups(const GatherConfiguration& configuration) {
  const int sums = sums_of_thread(configuration);
  const bool loads_much = configuration.slots == 1 || (configuration.slots == 8 && configuration.columns == 8);
  if (!loads_much || sums > 64 || configuration.exact || configuration.form == SourceForm::boxed) return 2;
  return sums > 32 ? 3 : 4;
}

// Whether a tile's products go on from one piece of the weights to the next, instead of all having been made at the end
// of each: where a step is of one kind alone. With more kinds, or fragments of 16 bytes, it took more than it gave.
constexpr bool flows_through_pieces(const GatherConfiguration& configuration) {
  return configuration.pattern != Pattern::listed ||
         (configuration.form == SourceForm::boxed && band_slots(configuration) == configuration.slots);
}

// Units that one step has at most: its products hide what a warp does between two steps, but its fragments, two steps'
// at a time, have to fit into registers beside the sums, and code for every number of units and set of bands into
// caches.
constexpr int kMaximumUnitsOfStep = 4;
constexpr int units_together(const GatherConfiguration& configuration) {
  if (configuration.pattern != Pattern::listed) return StepPattern(configuration).channel_groups();
  if (configuration.exact) return 1;
  if (configuration.form == SourceForm::in_place) return kMaximumUnitsOfStep;
  const int sums = sums_of_thread(configuration);
  const int bands = configuration.slots / band_slots(configuration);
  return bands <= 2 && sums <= 96 && loading_warpgroups(configuration) == 2 ? kMaximumUnitsOfStep : 2;
}

// Units of some offsets of the source that the same bands have taps for. A unit is the 32 bytes of channels of one tap
// for each slot of a band, by all columns. Of a pattern all units, and the shift of its first part.
struct PipelinedStep {
  int32_t shift[kMaximumUnitsOfStep]{};  // from a position's own place in the stage's source to theirs, in bytes
  uint32_t weights = 0;                  // where its units begin in their piece, in 16 bytes
  uint16_t code = 0;  // the number of kSetsOf1 to 8, times what units_together says, and the units less one
  uint8_t bands = 0;  // the set itself
  bool starts = true, folds = true;  // the exact sums, see folded_steps
};

// Steps whose exact sums are added up together: each addition of float32 rounds once more, and each product cuts off.
constexpr int folded_steps(int64_t terms) { return terms > 1024 ? 2 : 1; }

// Steps whose weights arrive together.
struct WeightPiece {
  uint16_t first_step = 0, steps = 0;
  uint16_t first_unit = 0, units = 0;
};

// The steps that read one residue of the source, or all of them.
struct PipelinedPass {
  uint16_t first_piece = 0, pieces = 0;
  int32_t origin[3]{};           // the first source position that tile position 0 reads
  int32_t planes = 1, rows = 1;  // that it reads of those in a stage
};

// The residues that one tile makes, from `residue` upwards.
struct PipelinedPhase {
  uint16_t first_pass = 0, passes = 0;
  int16_t residue[3]{};
};

constexpr int kMaximumPipelinedSteps = 512;
constexpr int kMaximumTaps = 2048;  // of all units
constexpr int kMaximumPieces = 256;
constexpr int kMaximumPasses = 64;
constexpr int kMaximumPhases = 32;

// Passed to the kernels by value, so that nothing has to be copied to the device beforehand.
struct PipelinedTables {
  PipelinedStep steps[kMaximumPipelinedSteps + 3];  // read ahead
  WeightPiece pieces[kMaximumPieces];
  PipelinedPass passes[kMaximumPasses];
  PipelinedPhase phases[kMaximumPhases];
};

// How the source is loaded: 16 bytes of channels, which are neighbours, at a time; 16 bytes of neighbours along the
// width, which a warp transposes as it stores them; two neighbours along the width; or element by element.
enum class SourceLoads { vectors, rows, pairs, elements };
// Chunks of 16 bytes of channels of one cell that one thread takes; of rows, see PipelinedGather::row_cells.
constexpr int chunks_together(SourceLoads loads) { return loads == SourceLoads::vectors ? 1 : 2; }
// Positions of a cell: neighbours along the width that are one load.
constexpr CONVT3D_HOST_DEVICE int cell_positions(SourceLoads loads, int element_bytes) {
  return loads == SourceLoads::rows ? 16 / element_bytes : loads == SourceLoads::pairs ? 2 : 1;
}
// Units (see PipelinedGather::thread_units) in a batch, which is 16 loaded words.
constexpr int units_of_batch(SourceLoads loads, int element_bytes) {
  return loads == SourceLoads::rows ? 1 : loads == SourceLoads::vectors || element_bytes == 4 ? 4 : 2;
}

struct PipelinedGather {
  // Which kernel: an entry of kPipelinedGathers, with so many warpgroups that multiply.
  int slots = 1, columns = 8, row_blocks = 1;
  bool exact = false;
  SourceForm form = SourceForm::gathered;
  int warpgroups = 1;
  int loading = 1;        // warpgroups that load
  int element_bytes = 4;  // of the source

  int merged_groups = 1;  // groups that count as one, see with_merged_groups

  int slot_bits[3] = {0, 0, 0};  // logarithms of the slots along each axis
  int slot_extent[3] = {1, 1, 1};
  int fold[3] = {1, 1, 1};  // neighbouring positions that count as one, so that there are as many times the residues
  int phase_blocks = 1, column_blocks = 1, channel_blocks = 1;
  uint64_t bare_residues[2] = {0, 0};  // as bits: those along the depth and the height whose blocks have no tap
  int passes[3] = {1, 1, 1};           // residues of the source along each axis that have passes of their own
  int channel_groups = 1;              // 32 bytes of source channels each, in a stage
  int samples = 1;                     // of the batch, in one tile
  int tile[3] = {1, 1, 1};             // positions q
  int block[3] = {1, 1, 1};            // of these, what the tile is made of: in place 64, eight eights along one axis,
  int eight_step[3] = {0, 0, 0};       // from one to the next so many positions along each axis,
  int eight_stride = 8;                // and so many of the stage's source
  int64_t tiles[3] = {1, 1, 1};
  int source_stride[3] = {1, 1, 1}, destination_stride[3] = {1, 1, 1};
  int source_step[3] = {1, 1, 1};       // of a pass, in source positions
  int planes = 1, rows = 1, width = 1;  // of a sample in a stage's source
  int row_pitch = 1;                    // positions that a row has room for: they are ordered by their residue modulo
  int residue_pitch = 1;                // M, so far apart
  int used_pitch = 1;                   // those that it needs
  int spare_positions = 0;              // behind those of a stage's source, for what belongs nowhere
  int source_positions = 1;             // in a stage, with the spare one
  int half_stride = 0;                  // from the first 16 bytes of a group's channels to the others, in bytes
  int source_stages = 2, weight_stages = 2;
  int unit_bytes = 0, piece_units = 0;  // of the weights; the latter at most
  bool keeps_weights = false;           // all of a block's tiles take the same weights, which its stages have room for
  int64_t source_stage_bytes = 0, weight_stage_bytes = 0, staging_bytes = 0, shared_bytes = 0;
  bool stores_in_bulk = false;         // NDHWC: by way of shared memory, where the address allows
  bool whole_rows = false;             // in which all of a tile's voxels of a row are one run
  bool stores_from_registers = false;  // NCDHW: each thread what it has, floats by pairs
  int storing_warps = 0;               // NCDHW: that store while others go on with the next tile
  int units = 0;                       // of all residues, for one block of channels and columns
  // Whether some slot of a band has no tap where another one has, or a group another one's channels. Its weights are
  // zeros there, so that what is not finite in the source would spoil sums that it does not belong to.
  bool has_gaps = false;
  int64_t packed_bytes = 0;  // of the weights, and with gaps 16 more, for whether the source is finite
  int64_t items = 0;         // tiles by residues, columns and groups
  int blocks = 0;            // of threads
  Divisor<int32_t> by_columns, by_phases, by_groups, by_tiles[3], by_tile[3], by_rows, by_planes, by_source_stride;
  PipelinedTables tables;
  // Of each unit and slot of its band: tap * channel_groups + channel group, or kNoTap.
  uint16_t unit_order[kMaximumTaps]{};
  static constexpr uint16_t kNoTap = 0xffff;

  // Copied and boxed: from one channel to the next, in bytes; and which of a unit's channels neighbouring lanes have.
  int channel_pitch = 0, channel_step = 1;

  // What storing warps store in bulk: runs of voxels of a channel, as they lie in the destination. Behind the tables,
  // whose place in a kernel's arguments counts: kb68 in TF32 took 5 % longer with them 16 bytes further on.
  bool stores_runs = false;
  bool whole_planes = false;     // all that a tile has of a plane is one run
  int runs = 0, plane_runs = 0;  // in a tile, and in one of its planes
  int run_pitch = 0;             // from one run to the next in shared memory, in elements

  bool fills_planes = false;  // rows without taps are filled together with those between them, which come after
  // Runs have rows without taps as well, which are put into shared memory before the others, and the warps that store
  // them fill what lies between them; then no kernel goes first.
  bool fills_runs = false;

  Pattern pattern = Pattern::listed;

  // From one group of 32 bytes of channels to the next, in a stage.
  CONVT3D_HOST_DEVICE int group_bytes() const { return boxed() ? 8 * channel_pitch : 2 * half_stride; }
  CONVT3D_HOST_DEVICE int box_bytes() const { return samples * stage_channels() * channel_pitch; }
  CONVT3D_HOST_DEVICE int stage_channels() const { return channel_groups * 32 / element_bytes; }
  bool has_pattern() const { return pattern != Pattern::listed; }
  bool has_neighbours() const { return has_pattern() && pattern != Pattern::points; }  // as parts of a step
  bool in_place() const { return form == SourceForm::in_place; }
  bool copied() const { return form == SourceForm::copied; }
  CONVT3D_HOST_DEVICE bool boxed() const { return form == SourceForm::boxed; }
  CONVT3D_HOST_DEVICE bool is_bare(int axis, int64_t residue) const { return bare_residues[axis] >> residue & 1; }
  // With filled runs, the first row of a plane that none of them has.
  CONVT3D_HOST_DEVICE int64_t first_bare_row() const { return tiles[1] * tile[1] * destination_stride[1]; }
  CONVT3D_HOST_DEVICE int parts() const {
    return exact ? 2 : 1;
  }  // of a float32: what tf32 holds, and what that leaves over
  GatherConfiguration configuration() const { return {slots, columns, row_blocks, exact, form, pattern}; }
  int step_units() const { return units_together(configuration()); }  // at most
  CONVT3D_HOST_DEVICE int64_t weight_bytes() const { return packed_bytes - (has_gaps ? 16 : 0); }
  int band() const { return band_slots(configuration()); }
  int bands() const { return slots / band(); }
  CONVT3D_HOST_DEVICE int positions() const { return 64 * warpgroups * row_blocks; }
  CONVT3D_HOST_DEVICE int tile_positions() const { return samples * tile[0] * tile[1] * tile[2]; }
  CONVT3D_HOST_DEVICE int lines() const { return samples * planes * rows; }
  // Cells, each what one load covers, that cover a line wherever it begins.
  int line_cells(SourceLoads loads) const {
    const int together = cell_positions(loads, element_bytes);
    return ceil_divide(width + together - 1, together);
  }
  int stage_cells(SourceLoads loads) const { return lines() * line_cells(loads); }
  // Of rows, cells that a warp takes at once, each lane one channel of one cell; and those of a batch, which is four
  // chunks of channels of these, or two of twice as many where a stage has no more.
  int row_cells() const { return 2 * element_bytes; }
  int batch_cells() const { return row_cells() * (channel_groups == 1 ? 2 : 1); }
  int batches_of_cells() const { return channel_groups == 4 ? 2 : 1; }  // for all of a stage's channels
  // Cells that there are places and targets for: of rows, as many as all warps take together.
  int cells(SourceLoads loads) const {
    if (loads != SourceLoads::rows) return stage_cells(loads);
    return ceil_divide(thread_units(loads) * (source_threads() / 32), batches_of_cells()) * batch_cells();
  }
  // Of the tables where a cell's positions belong and where the cells of two passes come from, see SourceLoader.
  int64_t source_table_bytes(SourceLoads loads) const {
    if (copied() || boxed()) return 0;
    return int64_t{4} * (cell_positions(loads, element_bytes) * (cells(loads) + 1) + 2 * cells(loads));
  }
  int threads() const { return 128 * (warpgroups + loading); }
  // Of these: the others copy weights, and store.
  CONVT3D_HOST_DEVICE int source_threads() const { return 128 * loading - 32 - 32 * storing_warps; }
  // Units of 16 bytes of channels of one load's positions that one thread loads of a stage: neighbouring chunks of
  // channels of one cell, but for vectors. Of rows, batches of a warp.
  int thread_units(SourceLoads loads) const {
    if (loads == SourceLoads::rows) {
      return ceil_divide(ceil_divide(stage_cells(loads), batch_cells()) * batches_of_cells(), source_threads() / 32);
    }
    const int together = chunks_together(loads);
    return ceil_divide(ceil_divide(2 * channel_groups * stage_cells(loads), together), source_threads()) * together;
  }
  std::string name() const;  // of the entry of kPipelinedGathers
};

// The same problem with so many neighbouring groups as one, whose weights are zero from one group to another. The 32
// bytes of channels that a product takes are more than some groups have: it makes several groups' columns at once.
inline Problem with_merged_groups(Problem problem, int merged) {
  problem.groups /= merged;
  return problem;
}

// Whether a kernel's loading warps watch for what is not finite: where its weights may have gaps.
constexpr CONVT3D_HOST_DEVICE bool watches_source(const GatherConfiguration& configuration) {
  return band_slots(configuration) > 1 || (configuration.slots == 1 && configuration.columns <= 16);
}

// Elements from one channel to the next of what leaves through shared memory in NCDHW: 16 bytes more than the voxels
// take, which are a multiple of 64, so that no two lanes meet in a bank.
constexpr CONVT3D_HOST_DEVICE int staging_pitch(int run, int element_bytes) { return run + 16 / element_bytes; }

// Columns that leave through shared memory together, in NCDHW, and the floats that this takes for a warpgroup.
constexpr int staged_columns(int columns, int row_blocks) {
  const int most = row_blocks == 1 ? 32 : 16;
  if (columns <= most) return columns;
  return columns % most == 0 ? most : 24 <= most && columns % 24 == 0 ? 24 : columns % 16 == 0 ? 16 : 8;
}
constexpr int staging_floats(int columns, int row_blocks) {
  return staged_columns(columns, row_blocks) * staging_pitch(64 * row_blocks * 2, 4);
}

// Whether some of a kernel's loading warps may store, in NCDHW, what multiplying ones hand over, while these go on with
// the next tile: runs, or half types word by word, which where loading takes more warps than two warpgroups was slower.
constexpr CONVT3D_HOST_DEVICE bool hands_over_runs(const GatherConfiguration& configuration) {
  return !configuration.exact && configuration.form != SourceForm::in_place && configuration.pattern != Pattern::points;
}
constexpr CONVT3D_HOST_DEVICE bool hands_over_words(const GatherConfiguration& configuration, int element_bytes) {
  return element_bytes == 2 && hands_over_runs(configuration) && loading_warpgroups(configuration) == 2;
}
// Whether such runs may have rows without taps as well. Code for that in other kernels would be for few layers, and the
// more code the slower: with all of it in every kernel kb73 took 0.57 ms instead of 0.53, nnunet_mid 0.071 instead of
// 0.068.
constexpr CONVT3D_HOST_DEVICE bool may_fill_runs(const GatherConfiguration& configuration) {
  return hands_over_runs(configuration) && configuration.form == SourceForm::gathered &&
         configuration.pattern == Pattern::listed;
}
// Columns that are handed over at a time: as many as leave room for stages, which boxes take less of.
constexpr CONVT3D_HOST_DEVICE int handed_columns(const GatherConfiguration& configuration, int element_bytes) {
  const int most_bytes = (configuration.form == SourceForm::boxed ? 128 : 64) * 1024;
  const int column_bytes = 128 * configuration.row_blocks * configuration.slots * element_bytes;
  int columns = configuration.columns;
  while (columns > 8 && columns * column_bytes > most_bytes) columns = (columns / 2 + 7) / 8 * 8;
  return columns;
}

// What a warp stores in bulk in NDHWC, of eight positions and one row of slots, and for how many of these it has room.
constexpr CONVT3D_HOST_DEVICE int bulk_bytes(int row_slots, int columns, int element_bytes) {
  return 8 * row_slots * columns * element_bytes;
}
constexpr CONVT3D_HOST_DEVICE int bulk_buffers(int bytes) { return bytes > 2048 ? 2 : 4; }

// What each warp that stores filled runs has room for of the constant that it fills gaps between these with.
constexpr int kConstantBytes = 2048;

// A thread's sums are two neighbouring columns of each block of eight. In NDHWC it writes them 16 bytes of channels at
// a time, so the columns of so many blocks (from the first on, of a kernel's) are channels in another order.
constexpr CONVT3D_HOST_DEVICE int blocks_together(int block, int blocks, int element_bytes) {
  int together = 8 / element_bytes;
  while (together > blocks - block) together /= 2;
  return together;
}
constexpr CONVT3D_HOST_DEVICE int channel_of_column(int column, int columns, int element_bytes) {
  int block = 0, together = blocks_together(0, columns / 8, element_bytes);
  while (column / 8 >= block + together) {
    block += together;
    together = blocks_together(block, columns / 8, element_bytes);
  }
  return 8 * block + column % 8 / 2 * 2 * together + (column / 8 - block) * 2 + column % 2;
}

// How a source that begins at `address` is loaded.
SourceLoads source_loads(const Problem& problem, Operator op, const PipelinedGather& gather, uintptr_t address);

// How the kernel takes the problem, and the clock cycles that this is expected to take; or nothing where it doesn't.
std::optional<double> cut_pipelined_gather(const Problem& problem, Operator op, const Target& target,
                                           PipelinedGather& gather);

}  // namespace convt3d::direct
