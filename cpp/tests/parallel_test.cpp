// Loops on several threads: every iteration once, and what one of them throws is thrown to the caller.
#include "parallel.h"

#include <atomic>
#include <stdexcept>
#include <vector>

#include "check.h"

int main() {
  using namespace convt3d;
  using namespace convt3d::test;
  for (const int threads : {1, 4}) {
    std::vector<std::atomic<int>> visits(1000);
    parallel_for(threads, 1000, [&](int64_t i) { ++visits[i]; });
    int once = 0;
    for (const std::atomic<int>& count : visits) once += count == 1 ? 1 : 0;
    CHECK(once == 1000) << once << " on " << threads << " threads";
    const std::string message = message_of<std::runtime_error>([&] {
      parallel_for(threads, 1000, [](int64_t i) {
        if (i == 700) throw std::runtime_error("iteration 700");
      });
    });
    CHECK(message == "iteration 700") << message << " on " << threads << " threads";
  }
  return finish();
}
