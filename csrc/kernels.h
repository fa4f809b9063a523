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

constexpr int64_t kStatsGroup = 256;   // block scales that share one second-level scale
constexpr int64_t kMomentBlock = 256;  // 8-bit moments that share one scale
constexpr int64_t kSegment = 4096;     // columns of a dropout row that are one unit of work

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

struct Mask {
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;  // at most 65535
  float scale;
};

struct Dropout {
  const void* x;  // [m, k], rows row_stride elements apart
  void* out;      // [m, k]
  int64_t row_stride;
  int64_t k;
  Mask mask;
};

// A type of 8-bit moments.
struct Codes {
  const float* values;     // [256], ascending, as fastlora.codebooks makes them
  const float* midpoints;  // [255]: where the nearest code changes
  const uint8_t* guess;    // [65536]: by the upper 16 bits of a number its code, or the one below
};

// A step of AdamW over a span of the vector that parameters are together.
struct AdamW {
  void* const* params;       // [count]
  const void* const* grads;  // [count]; null: nothing is changed
  const int64_t* starts;     // [count + 1]: where each parameter begins in the vector
  const int64_t* rows;       // [count]: of `hypers`
  const float* hypers;       // [rows, 8]
  int64_t count;
  int64_t first;  // where the span begins in the vector

  // of the span: 32 bits, or codes and a scale for each block of 256
  void* m;
  void* v;
  float* m_scale;
  float* v_scale;
  Codes m_codes, v_codes;
};

// What a product is made of. All operands of one product have the same dtype T, sums are fp32.

struct Nf4 {
  DequantizeBlocks blocks;  // `out` is not used
  int64_t n, k;
  int block_shift;  // log2 of the block size: a division by it would take longer than the decoding
};

// [rows, depth]
struct Left {
  const void* data;
  int64_t stride;  // between rows
};

// [depth, columns]
struct Right {
  enum Form {
    kRows,        // element (k, j) is data[k * stride + j]
    kColumns,     // element (k, j) is data[j * stride + k]
    kNf4Rows,     // element (k, j) is weight[k, j]
    kNf4Columns,  // element (k, j) is weight[j, k]
  } form;
  const void* data;
  int64_t stride;
  const Nf4* weight;
  float scale;  // of dense elements; in slots of pairs their product is rounded
};

struct Term {
  Left left;
  Right right;
  int64_t depth;
  int64_t step;  // depth of a panel, at most kDepth slots: it alone decides the order of sums
  // rows of the left operand that all blocks of a call share: [depth / step, packed_rows,
  // kLeftStride]
  const float* packed;
  int64_t packed_rows;
};

// out [rows, columns] = mask(lora) + sum of terms + bias
struct Product {
  Term lora;         // depth 0: none
  const Mask* mask;  // or null
  const Term* terms;
  int64_t count;
  const void* bias;  // [columns], T, or null; only without mask
  void* out;         // T
  int64_t out_stride;
  bool accumulate;  // add to what is in out
};

struct Block {
  int64_t row, rows;        // at most kBlockRows
  int64_t column, columns;  // at most kBlockColumns, `column` a multiple of kUnit
  int64_t packed_row;       // where `row` is in `packed`
};

// What adapters need of tokens, in one pass over them:
//   out [rows, r] = tokens adapter
//   reduced [r, columns] += factors^T tokens
struct Tokens {
  Left tokens;           // [rows, columns]
  const Mask* drop;      // dropout of the tokens, or null
  const float* adapter;  // [columns, r rounded up to kUnit]; null: no out
  void* out;             // T
  int64_t out_stride;
  const Left* factors;  // [rows, r]; null: no reduced
  float* reduced;       // rows reduced_stride apart, which is a multiple of kUnit
  int64_t reduced_stride;
  int64_t r;
};

struct Range {
  int64_t first, last;
};

// Sizes of what stays in the caches of one core. A panel of the right operand is kDepth x
// kBlockColumns numbers, the sums are kBlockRows x kBlockColumns; kTokenRows x kTokenColumns tokens
// are packed at once.
constexpr int64_t kDepth = 256;
constexpr int64_t kBlockColumns = 128;
constexpr int64_t kBlockRows = 512;
constexpr int64_t kTokenRows = 56;
constexpr int64_t kTokenColumns = 8 * kDepth;
constexpr int64_t kUnit = 32;                 // columns that a decode writes at once
constexpr int64_t kLeftStride = kDepth + 16;  // no two rows in the same set of the first cache

// 32-bit numbers, aligned to 64 bytes, that a kernel works in: sums and a panel, or packed tokens,
// their factors and sums
constexpr int64_t kProductScratch = (kBlockRows + kDepth) * kBlockColumns;
constexpr int64_t kTokenScratch =
    (kTokenColumns / kDepth + 1) * kTokenRows * kLeftStride + kTokenRows * kBlockColumns;
constexpr int64_t kScratch = kProductScratch > kTokenScratch ? kProductScratch : kTokenScratch;

// arrays are indexed by dtype, FASTLORA_FP32 first
struct Kernels {
  const char* name;
  int per_slot[3];  // numbers of the depth that one slot of a product's operands holds
  int64_t (*quantize_blocks[3])(const QuantizeBlocks&, int64_t first, int64_t last);  // NaN + Inf
  void (*quantize_stats)(const QuantizeStats&, int64_t first, int64_t last);
  void (*dequantize_blocks[3])(const DequantizeBlocks&, int64_t first, int64_t last);
  void (*dropout[3])(const Dropout&, int64_t first, int64_t last);
  // elements [first, last) of the vector; with 8 bits whole blocks, but for the end of the span
  void (*adamw32[3])(const AdamW&, int64_t first, int64_t last);
  void (*adamw8[3])(const AdamW&, int64_t first, int64_t last);
  // `count` numbers of the depth, from `first` on
  void (*pack_left[3])(const void* row, int64_t first, int64_t count, float* out);
  void (*multiply[3])(const Product&, const Block&, float* scratch);
  void (*pass_tokens[3])(const Tokens&, Range rows, Range columns, float* scratch);
  void (*pack_adapter[3])(const Right&, Range depth, int64_t r, float* out);
};

// the x86 files are empty elsewhere, and for compilers without per-file targets
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define FASTLORA_X86 1
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#else
#define FASTLORA_X86 0
#endif
// instructions that older compilers do not know
#if FASTLORA_X86 && (__GNUC__ >= 10 || __clang_major__ >= 9)
#define FASTLORA_X86_BF16 1
extern const Kernels kAvx512Bf16;
#else
#define FASTLORA_X86_BF16 0
#endif
#if FASTLORA_X86_BF16 && defined(__x86_64__) && defined(__linux__) && \
    (__GNUC__ >= 11 || __clang_major__ >= 12)
#define FASTLORA_X86_AMX 1
void multiply_amx(const Product&, const Block&, float* scratch);  // bf16; else kAvx512Bf16
#else
#define FASTLORA_X86_AMX 0
#endif
#if defined(__aarch64__) && !defined(__AARCH64EB__) && defined(__GNUC__)
#define FASTLORA_NEON 1
extern const Kernels kNeon;
#else
#define FASTLORA_NEON 0
#endif
extern const Kernels kPortable;

}  // namespace fastlora

#endif  // FASTLORA_KERNELS_H_
