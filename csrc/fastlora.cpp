// The C ABI of what streams through tensors, spread over threads: quantisation and dropout.
#include "fastlora.h"

#include <atomic>

#include "isa.h"
#include "parallel.h"

namespace fastlora {
namespace {

// fewest elements that are worth a thread: about 10 microseconds
constexpr int64_t kGrain = 32768;

}  // namespace
}  // namespace fastlora

using namespace fastlora;

int fastlora_abi(void) { return FASTLORA_ABI; }

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
  const Dropout args{
      x,
      out,
      row_stride,
      k,
      {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(state[1]), threshold, scale}};
  const auto kernel = kernels().dropout[dtype];
  const int64_t segments = ceil_div(k, kSegment);
  parallel_for(m * segments, ceil_div(kGrain * segments, k > 0 ? k : 1), threads,
               [&](int64_t first, int64_t last) { kernel(args, first, last); });
}
