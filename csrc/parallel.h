// Threads of the OpenMP runtime that is already in the process.
//
// PyTorch has loaded one before this library. Its entry point is called directly, through weak
// references and without linking to any runtime, because a second one would bring its own pool of
// threads and compete for the cores. Whatever the compiler, no OpenMP flag is needed. Without a
// runtime, and outside Linux, work runs on the calling thread.
#ifndef FASTLORA_PARALLEL_H_
#define FASTLORA_PARALLEL_H_

#include <stdint.h>

#include <algorithm>
#include <atomic>

#if defined(__linux__)
// libgomp's ABI, which libomp and libiomp5 offer too
extern "C" {
[[gnu::weak, gnu::visibility("default")]] void GOMP_parallel(void (*body)(void*),
                                                             void* context,
                                                             unsigned threads,
                                                             unsigned flags);
[[gnu::weak, gnu::visibility("default")]] int omp_get_thread_num(void);
[[gnu::weak, gnu::visibility("default")]] int omp_get_num_threads(void);
}
#endif

namespace fastlora {

inline bool has_threads() {
#if defined(__linux__)
  return &GOMP_parallel != nullptr && &omp_get_thread_num != nullptr &&
         &omp_get_num_threads != nullptr;
#else
  return false;
#endif
}

// Calls body(first, last) for ranges that together are [0, count), each of at least `grain`.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t useful = std::min<int64_t>(threads, count / std::max<int64_t>(grain, 1));
  // a forked child has no pool and passes threads = 1: it must not enter the runtime
  if (useful <= 1 || !has_threads()) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#if defined(__linux__)
  struct Context {
    const Body& body;
    int64_t count;
  } context{body, count};
  const auto run = [](void* pointer) {
    const auto& c = *static_cast<Context*>(pointer);
    // the team may be smaller than what was asked for
    const int64_t team = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t size = c.count / team, extra = c.count % team;
    const int64_t first = i * size + std::min(i, extra);
    const int64_t last = first + size + (i < extra ? 1 : 0);
    if (first < last) c.body(first, last);
  };
  GOMP_parallel(run, &context, static_cast<unsigned>(useful), 0);
#endif
}

// Calls body(task) for every task in [0, count); a thread that is done takes the next one.
template <class Body>
void parallel_tasks(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, count), 1, threads, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) body(task);
  });
}

}  // namespace fastlora

#endif  // FASTLORA_PARALLEL_H_
