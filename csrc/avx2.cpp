// The kernels for x86 processors with AVX2, FMA and F16C.
//
// Only this file is compiled for them, and it runs only after fastlora.cpp has asked the CPU. No
// library code with inline functions is included: see kernels.h.
#include "kernels.h"

#if FASTLORA_X86

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "fastlora.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace fastlora {
namespace {

#include "scalar.h"
#include "simd_avx2.h"
// the kernels need what the two above define
#include "dropout_kernels.h"
#include "nf4_kernels.h"
#include "tile_kernels.h"
// and these what the kernels define
#include "panel_kernels.h"
// and these what the panels define
#include "few_kernels.h"
// and these what all of them define
#include "product_kernels.h"
#include "token_kernels.h"

}  // namespace

const Kernels kAvx2 = {
    "avx2",
    {1, 1, 1},
    {quantize_blocks<float>, quantize_blocks<Fp16>, quantize_blocks<Bf16>},
    quantize_stats,
    {dequantize_blocks<float>, dequantize_blocks<Fp16>, dequantize_blocks<Bf16>},
    {dropout<float>, dropout<Fp16>, dropout<Bf16>},
    {pack_left<float, Fp32Format>, pack_left<Fp16, Fp32Format>, pack_left<Bf16, Fp32Format>},
    {multiply_block<float, Fp32Format>, multiply_block<Fp16, Fp32Format>,
     multiply_block<Bf16, Fp32Format>},
    {pass_tokens<float>, pass_tokens<Fp16>, pass_tokens<Bf16>},
    {pack_adapter<float>, pack_adapter<Fp16>, pack_adapter<Bf16>},
};

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // FASTLORA_X86
