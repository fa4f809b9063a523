// The C ABI of what streams through tensors, spread over threads: quantisation, dropout and
// the optimizer.
#include "fastlora.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "parallel.h"

namespace fastlora {
namespace {

// fewest elements that are worth a thread: about 10 microseconds
constexpr int64_t kGrain = 32768;

AdamW adamw_of(const fastlora_step& step, int64_t first, void* m, void* v) {
  AdamW args{};
  args.params = step.params;
  args.grads = step.grads;
  args.starts = step.starts;
  args.rows = step.rows;
  args.hypers = step.hypers;
  args.count = step.count;
  args.first = first;
  args.m = m;
  args.v = v;
  return args;
}

Codes codes_of(const fastlora_codes& codes) { return {codes.values, codes.midpoints, codes.guess}; }

// Calls kernel(args, first, last) for parts of a span, whole blocks of moments.
void spread(void (*kernel)(const AdamW&, int64_t, int64_t),
            const AdamW& args,
            int64_t numel,
            int threads) {
  static_assert(kGrain % kMomentBlock == 0, "a block has one scale");
  const int64_t last = args.first + numel;
  parallel_tasks(ceil_div(numel, kGrain), threads, [&](int64_t task) {
    const int64_t begin = args.first + task * kGrain;
    kernel(args, begin, std::min(begin + kGrain, last));
  });
}

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

void fastlora_adamw32(
    const fastlora_step* step, int64_t first, int64_t numel, float* m, float* v, int threads) {
  spread(kernels().adamw32[step->dtype], adamw_of(*step, first, m, v), numel, threads);
}

void fastlora_adamw8(const fastlora_step* step,
                     int64_t first,
                     int64_t numel,
                     uint8_t* m,
                     uint8_t* v,
                     float* m_scale,
                     float* v_scale,
                     const fastlora_codes* m_codes,
                     const fastlora_codes* v_codes,
                     int threads) {
  AdamW args = adamw_of(*step, first, m, v);
  args.m_scale = m_scale;
  args.v_scale = v_scale;
  args.m_codes = codes_of(*m_codes);
  args.v_codes = codes_of(*v_codes);
  spread(kernels().adamw8[step->dtype], args, numel, threads);
}
