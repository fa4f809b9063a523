// The C ABI: picks the kernels for this CPU and spreads their work over threads.
#include "fastlora.h"

#include <atomic>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

#if FASTLORA_X86
#include <cpuid.h>
#endif

namespace fastlora {
namespace {

// fewest elements that are worth a thread: about 10 microseconds
constexpr int64_t kGrain = 32768;

struct Isa {
  const Kernels* kernels;
  bool runs;
};

#if FASTLORA_X86
bool has_avx2() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // F16C by hand, its name is unknown to older compilers
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// best first, the last one always runs
const Isa kIsas[] = {
#if FASTLORA_X86
    {&kAvx512, has_avx512()},
    {&kAvx2, has_avx2()},
#endif
    {&kPortable, true},
};

const Kernels* best() {
  for (const Isa& isa : kIsas) {
    if (isa.runs) return isa.kernels;
  }
  return &kPortable;
}

std::atomic<const Kernels*> active{best()};

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastlora

using namespace fastlora;

int fastlora_abi(void) { return FASTLORA_ABI; }

const char* fastlora_isas(void) {
  static char names[64] = "";
  if (names[0] == 0) {
    char joined[sizeof(names)] = "";
    for (const Isa& isa : kIsas) {
      if (!isa.runs) continue;
      if (joined[0] != 0) std::strcat(joined, ",");
      std::strcat(joined, isa.kernels->name);
    }
    std::memcpy(names, joined, sizeof(names));
  }
  return names;
}

const char* fastlora_isa(void) { return kernels().name; }

int fastlora_use_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (isa.runs && std::strcmp(isa.kernels->name, name) == 0) {
      active = isa.kernels;
      return 0;
    }
  }
  return 1;
}

int fastlora_has_threads(void) { return has_threads() ? 1 : 0; }

int64_t fastlora_quantize_blocks(const void* w,
                                 int dtype,
                                 int64_t numel,
                                 int64_t blocksize,
                                 const float* thresholds,
                                 uint8_t* packed,
                                 float* absmax,
                                 int threads) {
  const QuantizeBlocks args{w, thresholds, packed, absmax, numel, blocksize};
  const auto kernel = kernels().quantize_blocks[dtype];
  std::atomic<int64_t> nonfinite{0};
  parallel_for(ceil_div(numel, blocksize), ceil_div(kGrain, blocksize), threads,
               [&](int64_t first, int64_t last) { nonfinite += kernel(args, first, last); });
  return nonfinite;
}

void fastlora_quantize_stats(const float* absmax,
                             int64_t blocks,
                             const float* offset,
                             const uint8_t* lut,
                             uint8_t* codes,
                             float* absmax2,
                             int threads) {
  const QuantizeStats args{absmax, lut, codes, absmax2, blocks, *offset};
  const auto kernel = kernels().quantize_stats;
  parallel_for(ceil_div(blocks, kStatsGroup), kGrain / kStatsGroup, threads,
               [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void fastlora_dequantize_blocks(const uint8_t* packed,
                                const float* absmax,
                                const uint8_t* absmax_codes,
                                const float* absmax2,
                                const float* code2,
                                const float* offset,
                                const float* code,
                                int64_t numel,
                                int64_t blocksize,
                                int dtype,
                                void* out,
                                int threads) {
  const DequantizeBlocks args{packed, absmax, absmax_codes, absmax2,   code2,
                              code,   out,    numel,        blocksize, offset ? *offset : 0.0f};
  const auto kernel = kernels().dequantize_blocks[dtype];
  parallel_for(ceil_div(numel, blocksize), ceil_div(kGrain, blocksize), threads,
               [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

void fastlora_dropout(const void* x,
                      int dtype,
                      int64_t row_stride,
                      int64_t m,
                      int64_t k,
                      const int64_t* state,
                      uint32_t threshold,
                      float scale,
                      void* out,
                      int threads) {
  const Dropout args{x,
                     out,
                     row_stride,
                     k,
                     static_cast<uint64_t>(state[0]),
                     static_cast<uint32_t>(state[1]),
                     threshold,
                     scale};
  const auto kernel = kernels().dropout[dtype];
  const int64_t segments = ceil_div(k, kSegment);
  parallel_for(m * segments, ceil_div(kGrain * segments, k > 0 ? k : 1), threads,
               [&](int64_t first, int64_t last) { kernel(args, first, last); });
}
