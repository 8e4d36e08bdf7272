#include "emulation/block.h"

#include <ucontext.h>

#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace convt3d::emulation {

Index thread_index, block_index, block_extent, grid_extent;

namespace {

using Work = std::vector<std::function<void()>>;

struct Fiber {
  ucontext_t context{};
  std::vector<char> stack;
  const std::function<bool()>* condition = nullptr;  // that it waits for
  bool is_done = false;
  std::deque<Work> groups[3];
  Work open[3];
  std::mt19937 random;  // the same of all lanes of a warp
};

// Threads that come to a barrier together.
struct Meeting {
  int waiting = 0;
  unsigned phase = 0;
};

struct CountingBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Warp {
  Meeting meeting;
  LaneWords words{};
};

constexpr size_t kStackBytes = 256 << 10;

alignas(1024) unsigned char memory[kSharedBytes];
uint64_t asked_bytes = 0;
ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::map<int, Meeting> meetings;  // __syncthreads() has number -1
std::map<uint32_t, CountingBarrier> barriers;
const std::function<void()>* body = nullptr;
std::mt19937 turns;
std::exception_ptr failure;  // of a fiber, whose stack no exception leaves

Fiber& self() { return fibers[thread_index.x]; }
// The same for all threads of a warp that ask as often.
bool draw_of_warp() { return self().random() % 2 == 0; }
Warp& own_warp() { return warps[thread_index.x / 32]; }

void begin_fiber() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  self().is_done = true;
}

void come(Meeting& meeting, int threads) {
  if (++meeting.waiting < threads) return;
  meeting.waiting = 0;
  ++meeting.phase;
}
void meet(Meeting& meeting, int threads) {
  const unsigned phase = meeting.phase;
  come(meeting, threads);
  wait_until([&meeting, phase] { return meeting.phase != phase; });
}

void do_all(Work& group) {
  for (const std::function<void()>& work : group) work();
  group.clear();
}

void complete(CountingBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
}

CountingBarrier& barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) throw std::logic_error("no barrier at " + std::to_string(address));
  return found->second;
}

void run_block(int threads) {
  std::memset(memory, 0xff, sizeof memory);  // NaN, as float and as half types
  warps.assign(threads / 32, {});
  meetings.clear();
  barriers.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.condition = nullptr;
    fiber.is_done = false;
    for (std::deque<Work>& groups : fiber.groups) groups.clear();
    for (Work& open : fiber.open) open.clear();
    fiber.random.seed(i / 32);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, begin_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    bool goes_on = false;
    const unsigned first = turns() % threads;
    for (int i = 0; i < threads; ++i) {
      thread_index.x = (first + i) % threads;
      Fiber& fiber = self();
      if (fiber.is_done || (fiber.condition != nullptr && !(*fiber.condition)())) continue;
      fiber.condition = nullptr;
      swapcontext(&scheduler, &fiber.context);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      goes_on = true;
      if (fiber.is_done) --left;
    }
    if (!goes_on) throw std::logic_error("threads wait for each other forever");
  }
  for (int i = 0; i < threads; ++i) {
    for (const Unit unit : {Unit::products, Unit::bulk_stores}) {
      if (!fibers[i].groups[static_cast<int>(unit)].empty()) {
        throw std::logic_error("a thread ended before what it had begun");
      }
    }
  }
}

}  // namespace

void run(const Index& grid, int threads, uint64_t shared_bytes, const std::function<void()>& kernel) {
  if (threads > 1024 || threads % 32 != 0) throw std::logic_error(std::to_string(threads) + " threads");
  if (shared_bytes > kSharedBytes) throw std::logic_error(std::to_string(shared_bytes) + " bytes of shared memory");
  body = &kernel;
  asked_bytes = shared_bytes;
  grid_extent = grid;
  block_extent = {static_cast<unsigned>(threads), 1, 1};
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.resize(kStackBytes);
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z) {
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(threads);
    }
  }
}

void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  Fiber& fiber = self();
  fiber.condition = &condition;
  swapcontext(&fiber.context, &scheduler);
}

void synchronize_warp() { meet(own_warp().meeting, 32); }
void synchronize_block() { meet(meetings[-1], static_cast<int>(block_extent.x)); }
void synchronize(int barrier, int threads) { meet(meetings[barrier], threads); }
void arrive(int barrier, int threads) { come(meetings[barrier], threads); }

LaneWords& words_of_warp() { return own_warp().words; }

void make_barrier(uint32_t address, int arrivals) { barriers[address] = {arrivals, arrivals, 0, 0}; }

void arrive(uint32_t address) {
  CountingBarrier& barrier = barrier_at(address);
  if (--barrier.pending < 0) throw std::logic_error("more arrivals than a barrier expects");
  complete(barrier);
}

void add_bytes(uint32_t address, int64_t bytes) {
  CountingBarrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  if (bytes < 0) complete(barrier);
}

bool has_ended(uint32_t address, uint32_t parity) { return (barrier_at(address).phase & 1) != parity; }

void wait(uint32_t address, uint32_t parity) {
  wait_until([address, parity] { return has_ended(address, parity); });
}

void begin(Unit unit, const std::function<void()>& work) {
  Fiber& fiber = self();
  Work& open = fiber.open[static_cast<int>(unit)];
  open.push_back(work);
  if (unit != Unit::products || !draw_of_warp()) return;
  // At once, and so all that has begun before.
  for (Work& group : fiber.groups[static_cast<int>(unit)]) do_all(group);
  do_all(open);
}

void commit(Unit unit) {
  Work& open = self().open[static_cast<int>(unit)];
  self().groups[static_cast<int>(unit)].push_back(std::move(open));
  open.clear();
}

void finish(Unit unit, int pending) {
  std::deque<Work>& groups = self().groups[static_cast<int>(unit)];
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) do_all(groups.front());
}

unsigned char* shared_memory() { return memory; }

unsigned char* shared_at(uint32_t address, uint32_t bytes) {
  if (address + uint64_t{bytes} > asked_bytes) {
    throw std::logic_error(std::to_string(address) + " is beyond " + std::to_string(asked_bytes) + " bytes");
  }
  return memory + address;
}

}  // namespace convt3d::emulation

float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return chosen;
}

unsigned __ballot_sync(unsigned, int condition) {
  using namespace convt3d::emulation;
  LaneWords& words = words_of_warp();
  words[thread_index.x % 32][0] = condition != 0 ? 1 : 0;
  synchronize_warp();
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= words[lane][0] << lane;
  synchronize_warp();
  return votes;
}

uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> bits % 32);
}
