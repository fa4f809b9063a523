// What every instruction set implements: serial kernels over a range of blocks, groups or segments.
//
// Included by files compiled for different instruction sets, so it holds no inline function: the
// linker would keep one copy of it, perhaps the one that this CPU cannot run.
#ifndef FASTLORA_KERNELS_H_
#define FASTLORA_KERNELS_H_

#include <stdint.h>

namespace fastlora {

struct Fp16 {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

constexpr int64_t kStatsGroup = 256;  // block scales that share one second-level scale
constexpr int64_t kSegment = 4096;    // columns of a dropout row that are one unit of work

struct QuantizeBlocks {
  const void* w;            // [numel]
  const float* thresholds;  // [15]
  uint8_t* packed;          // [ceil(numel / 2)]
  float* absmax;            // [blocks]
  int64_t numel;
  int64_t blocksize;
};

struct QuantizeStats {
  const float* absmax;  // [blocks]
  const uint8_t* lut;   // [65536]
  uint8_t* codes;       // [blocks]
  float* absmax2;       // [groups]
  int64_t blocks;
  float offset;
};

struct DequantizeBlocks {
  const uint8_t* packed;        // [ceil(numel / 2)]
  const float* absmax;          // [blocks], or null
  const uint8_t* absmax_codes;  // [blocks], or null
  const float* absmax2;         // [groups], or null
  const float* code2;           // [256], or null
  const float* code;            // [16]
  void* out;                    // [numel]
  int64_t numel;
  int64_t blocksize;
  float offset;
};

struct Dropout {
  const void* x;  // [m, k], rows row_stride elements apart
  void* out;      // [m, k]
  int64_t row_stride;
  int64_t k;
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;  // at most 65535
  float scale;
};

// arrays are indexed by dtype, FASTLORA_FP32 first
struct Kernels {
  const char* name;
  int64_t (*quantize_blocks[3])(const QuantizeBlocks&, int64_t first, int64_t last);  // NaN + Inf
  void (*quantize_stats)(const QuantizeStats&, int64_t first, int64_t last);
  void (*dequantize_blocks[3])(const DequantizeBlocks&, int64_t first, int64_t last);
  void (*dropout[3])(const Dropout&, int64_t first, int64_t last);
};

// the x86 files are empty elsewhere, and for compilers without per-file targets
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTLORA_X86 1
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#else
#define FASTLORA_X86 0
#endif
extern const Kernels kPortable;

}  // namespace fastlora

#endif  // FASTLORA_KERNELS_H_
