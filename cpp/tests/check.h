// What a test program needs and no more: CHECK(condition) << "context", and finish() as main's exit status.
#pragma once

#include <iostream>
#include <sstream>
#include <string>

namespace convt3d::test {

inline int checks = 0, failures = 0;

inline bool passes(bool condition) {
  ++checks;
  return condition;
}

// Prints one failed check, with whatever was streamed into it.
class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    message_ << file << ':' << line << ": CHECK(" << condition << ") failed ";
  }
  ~Failure() {
    if (++failures <= kShown) std::cerr << message_.str() << '\n';
  }
  template <class Part>
  Failure& operator<<(const Part& part) {
    message_ << part;
    return *this;
  }

 private:
  static constexpr int kShown = 20;
  std::ostringstream message_;
};

// Turns a Failure into the void that the other branch of CHECK is.
struct Report {
  void operator&(const Failure&) const {}
};

// What the call throws as an Exception says, or a text that no check expects.
template <class Exception, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "(nothing was thrown)";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

inline int finish() {
  std::cout << checks << " checks, " << failures << " failed\n";
  return checks > 0 && failures == 0 ? 0 : 1;
}

}  // namespace convt3d::test

// An expression, so that it stands safely under an if: & binds looser than <<, and ?: looser than both.
#define CHECK(condition)             \
  ::convt3d::test::passes(condition) \
      ? static_cast<void>(0)         \
      : ::convt3d::test::Report() & ::convt3d::test::Failure(__FILE__, __LINE__, #condition)
