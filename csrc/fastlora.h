// The C ABI of the CPU kernels, called by fastlora/native.py through ctypes.
//
// Nothing here checks its arguments: the public Python functions did. Every pointer is aligned to
// its elements and need not be aligned to more; `threads` is an upper bound, small work uses fewer.
#ifndef FASTLORA_H_
#define FASTLORA_H_

#include <stdint.h>

#if defined(_WIN32)
#define FASTLORA_API __declspec(dllexport)
#else
#define FASTLORA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// changes with any signature below, so that an old library is refused instead of misread
#define FASTLORA_ABI 3

enum { FASTLORA_FP32 = 0, FASTLORA_FP16 = 1, FASTLORA_BF16 = 2 };

FASTLORA_API int fastlora_abi(void);

// Names of the instruction sets that were built and run on this CPU, best first, comma separated.
FASTLORA_API const char* fastlora_isas(void);

// The one in use; the best until fastlora_use_isa, which returns 0, or 1 when `name` cannot run.
FASTLORA_API const char* fastlora_isa(void);
FASTLORA_API int fastlora_use_isa(const char* name);

// 1 when an OpenMP runtime is loaded in this process, else 0 and everything runs on one thread.
FASTLORA_API int fastlora_has_threads(void);

// NF4 codes and block scales of w; returns how many weights are NaN or Inf (then bytes mean
// nothing).
FASTLORA_API int64_t
fastlora_quantize_blocks(const void* w,            // [numel], dtype
                         int dtype,                // FASTLORA_FP32, ...
                         int64_t numel,            // any
                         int64_t blocksize,        // a multiple of 32
                         const float* thresholds,  // [15], ascending
                         uint8_t* packed,          // [ceil(numel / 2)], out; high nibble first
                         float* absmax,            // [ceil(numel / blocksize)], out
                         int threads);

// 8-bit codes of block scales, groups of 256 with one scale each.
FASTLORA_API void fastlora_quantize_stats(
    const float* absmax,  // [blocks]
    int64_t blocks,
    const float* offset,  // [1]: subtracted first
    const uint8_t* lut,   // [65536]: code nearest to i / 32767.5 - 1
    uint8_t* codes,       // [blocks], out
    float* absmax2,       // [ceil(blocks / 256)], out
    int threads);

// Weights of packed codes. Nested scales when `absmax_codes` is not null, else `absmax` is read.
FASTLORA_API void fastlora_dequantize_blocks(const uint8_t* packed,        // [ceil(numel / 2)]
                                             const float* absmax,          // [blocks], or null
                                             const uint8_t* absmax_codes,  // [blocks], or null
                                             const float* absmax2,  // [ceil(blocks / 256)], or null
                                             const float* code2,    // [256], or null
                                             const float* offset,   // [1], or null
                                             const float* code,     // [16], the values of the codes
                                             int64_t numel,
                                             int64_t blocksize,  // a multiple of 32
                                             int dtype,
                                             void* out,  // [numel], dtype
                                             int threads);

// x with elements dropped, the others multiplied by `scale`; the mask is a function of state, m, k.
FASTLORA_API void fastlora_dropout(
    const void* x,  // [m, k], dtype, unit column stride
    int dtype,
    int64_t row_stride,  // of x, in elements
    int64_t m,
    int64_t k,
    const int64_t* state,  // [2]: seed, offset
    uint32_t threshold,    // an element is dropped iff its 16-bit number is below, at most 65535
    float scale,
    void* out,  // [m, k], dtype, contiguous
    int threads);

// --- optimizer -------------------------------------------------------------------------------

// Parameters that are one vector, without gaps, and how a step of AdamW updates each of them: see
// fastlora/optim.
typedef struct {
  void* const* params;       // [count], dtype, any number of elements each; overwritten
  const void* const* grads;  // [count], dtype; null: neither parameter nor moments change
  const int64_t* starts;     // [count + 1]: the first element of each, and how many there are
  const int64_t* rows;       // [count]: of `hypers`
  const float* hypers;       // [rows, 8]
  int64_t count;
  int dtype;
} fastlora_step;

// A type of 8-bit numbers: the code of x is g + (x > midpoints[g]), g being the guess for it.
typedef struct {
  const float* values;     // [256], ascending: fastlora.codebooks.dynamic_map or the unsigned one
  const float* midpoints;  // [255]
  const uint8_t* guess;    // [65536], by the upper 16 bits of x
} fastlora_codes;

// Updates elements [first, first + numel) of the vector and their moments.
FASTLORA_API void fastlora_adamw32(const fastlora_step* step,
                                   int64_t first,  // any
                                   int64_t numel,
                                   float* m,  // [numel]; overwritten
                                   float* v,  // [numel]; overwritten
                                   int threads);

FASTLORA_API void fastlora_adamw8(const fastlora_step* step,
                                  int64_t first,  // a multiple of 256
                                  int64_t numel,
                                  uint8_t* m,      // [numel]; overwritten
                                  uint8_t* v,      // [numel]; overwritten
                                  float* m_scale,  // [ceil(numel / 256)]; overwritten
                                  float* v_scale,  // [ceil(numel / 256)]; overwritten
                                  const fastlora_codes* m_codes,  // signed
                                  const fastlora_codes* v_codes,  // unsigned
                                  int threads);

// --- linear layers: m tokens, k in_features, n out_features, r rank ----------------------------
// m may be 0; k, n and r are 1 or more, unless it is said otherwise. Rows of activations and
// adapters may be `..._stride` elements apart, their columns are neighbours.

// A packed weight [n, k], as in fastlora_dequantize_blocks.
typedef struct {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* absmax2;
  const float* code2;
  const float* offset;
  const float* code;
  int64_t n;
  int64_t k;
  int64_t blocksize;  // a power of two, at least 32
} fastlora_nf4;

// s [m, r] = drop(x) a^T
FASTLORA_API void fastlora_lora_down(
    const void* x,  // [m, k], dtype
    int64_t x_stride,
    int dtype,
    int64_t m,
    int64_t k,
    const void* a,  // [r, k], dtype
    int64_t a_stride,
    int64_t r,
    const int64_t* state,  // [2]: seed, offset; null without dropout
    uint32_t threshold,
    float keep_scale,  // of elements that are kept
    void* s,           // [m, r], dtype, out, contiguous
    int threads);

// y [m, n] = x w^T + bias + scale * s b^T
FASTLORA_API void fastlora_linear(const void* x,  // [m, k], dtype
                                  int64_t x_stride,
                                  int dtype,
                                  int64_t m,
                                  int64_t n,
                                  const fastlora_nf4* w,  // or null: y is added to
                                  const void* bias,       // [n], dtype, or null
                                  const void* s,          // [m, r], dtype
                                  int64_t s_stride,
                                  const void* b,  // [n, r], dtype
                                  int64_t b_stride,
                                  int64_t r,  // 0 without LoRA
                                  float scale,
                                  void* y,  // [m, n], dtype, out, contiguous
                                  int threads);

// ds [m, r] = scale * dy b and db [n, r] = scale * dy^T s, in one pass over dy
FASTLORA_API void fastlora_lora_bwd_ds_db(const void* dy,  // [m, n], dtype
                                          int64_t dy_stride,
                                          int dtype,
                                          int64_t m,
                                          int64_t n,
                                          const void* b,  // [n, r], dtype
                                          int64_t b_stride,
                                          const void* s,  // [m, r], dtype
                                          int64_t s_stride,
                                          int64_t r,
                                          float scale,
                                          void* ds,  // [m, r], dtype, out
                                          int64_t ds_stride,
                                          float* db,  // [n, r], out, contiguous
                                          int threads);

// da [r, k] = ds^T drop(x)
FASTLORA_API void fastlora_lora_bwd_da(const void* x,  // [m, k], dtype
                                       int64_t x_stride,
                                       int dtype,
                                       int64_t m,
                                       int64_t k,
                                       const void* ds,  // [m, r], dtype
                                       int64_t ds_stride,
                                       int64_t r,
                                       const int64_t* state,  // [2]; null without dropout
                                       uint32_t threshold,
                                       float keep_scale,
                                       float* da,  // [r, k], out, contiguous
                                       int threads);

// dx [m, k] = sum of dy w over `count` layers + mask * (ds a)
FASTLORA_API void fastlora_linear_dx(const void* const* dys,       // [m, n] each, dtype
                                     const int64_t* dy_strides,    // [count]
                                     const fastlora_nf4* weights,  // [count]
                                     int64_t count,                // 0: only the LoRA part
                                     int dtype,
                                     int64_t m,
                                     int64_t k,
                                     const void* ds,  // [m, r], dtype
                                     int64_t ds_stride,
                                     const void* a,  // [r, k], dtype
                                     int64_t a_stride,
                                     int64_t r,             // 0 without LoRA
                                     const int64_t* state,  // [2]; null without dropout
                                     uint32_t threshold,
                                     float keep_scale,
                                     int accumulate,  // whether dx is added to
                                     void* dx,        // [m, k], dtype, out, contiguous
                                     int threads);

#ifdef __cplusplus
}
#endif

#endif  // FASTLORA_H_
