// The kernels for x86 processors with AVX2, FMA and F16C.
//
// Only this file is compiled for them, and it runs only after isa.cpp has asked the CPU. No
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
//
#include "moment_codes.h"
// the kernels need what those above define
#include "all_kernels.h"

}  // namespace

const Kernels kAvx2 = kernels_of<Fp32Format>("avx2");

}  // namespace fastlora

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // FASTLORA_X86
