// The kernels for x86 processors with AVX-512 BF16: products of bf16 numbers are made in pairs, all
// else is as with AVX-512.
//
// Only this file is compiled for them, and it runs only after isa.cpp has asked the CPU. No
// library code with inline functions is included: see kernels.h.
#include "kernels.h"

#if FASTLORA_X86_BF16

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "fastlora.h"

#if defined(FASTLORA_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

namespace fastlora {
namespace {

#include "scalar.h"
#include "simd_avx512.h"
#include "simd_avx512bf16.h"
//
#include "moment_codes.h"
// the kernels need what those above define
#include "all_kernels.h"

}  // namespace

const Kernels kAvx512Bf16 = kernels_of<PairFormat>("avx512bf16");

}  // namespace fastlora

#if defined(__clang__) && !defined(FASTLORA_EMULATE)
#pragma clang attribute pop
#endif

#endif  // FASTLORA_X86_BF16
