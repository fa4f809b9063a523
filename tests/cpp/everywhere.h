// Which instruction sets and how many threads a test runs with.
#ifndef FASTLORA_TESTS_EVERYWHERE_H_
#define FASTLORA_TESTS_EVERYWHERE_H_

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "values.h"

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The instruction sets to test, as `fastlora_isas` names them.
inline std::string& tested() {
  static std::string names = fastlora_isas();
  return names;
}

// Calls body in every instruction set, with one thread and with three.
inline void everywhere(const std::string& what, const std::function<void(int threads)>& body) {
  const std::string& names = tested();
  for (size_t first = 0; first < names.size();) {
    const size_t last = std::min(names.find(',', first), names.size());
    const std::string name = names.substr(first, last - first);
    if (fastlora_use_isa(name.c_str()) != 0) fail(name.c_str(), "not usable", 0);
    for (int threads : fastlora_has_threads() ? std::vector<int>{1, 3} : std::vector<int>{1}) {
      std::snprintf(context(), 200, "%s, %s, %d threads", name.c_str(), what.c_str(), threads);
      body(threads);
    }
    first = last + 1;
  }
}

#endif  // FASTLORA_TESTS_EVERYWHERE_H_
