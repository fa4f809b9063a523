// The kernels of one instruction set, after its scalar.h and simd_*.h: each header needs those
// above it. Included inside a namespace.

#include "adamw_kernels.h"
#include "dropout_kernels.h"
#include "nf4_kernels.h"
#include "tile_kernels.h"
//
#include "panel_kernels.h"
//
#include "few_kernels.h"
//
#include "product_kernels.h"
//
#include "token_kernels.h"

// Products of bf16 numbers have a Format of their own where there are instructions for them.
template <class Bf16Format>
constexpr Kernels kernels_of(const char* name) {
  return {
      name,
      {1, 1, Bf16Format::kPerSlot},
      {quantize_blocks<float>, quantize_blocks<Fp16>, quantize_blocks<Bf16>},
      quantize_stats,
      {dequantize_blocks<float>, dequantize_blocks<Fp16>, dequantize_blocks<Bf16>},
      {dropout<float>, dropout<Fp16>, dropout<Bf16>},
      {adamw32<float>, adamw32<Fp16>, adamw32<Bf16>},
      {adamw8<float>, adamw8<Fp16>, adamw8<Bf16>},
      {pack_left<float, Fp32Format>, pack_left<Fp16, Fp32Format>, pack_left<Bf16, Bf16Format>},
      {multiply_block<float, Fp32Format>, multiply_block<Fp16, Fp32Format>,
       multiply_block<Bf16, Bf16Format>},
      {pass_tokens<float>, pass_tokens<Fp16>, pass_tokens<Bf16>},
      {pack_adapter<float>, pack_adapter<Fp16>, pack_adapter<Bf16>},
  };
}
