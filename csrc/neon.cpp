// The kernels for Arm processors of 64 bits, all of which have NEON.
//
// No library code with inline functions is included: see kernels.h.
#include "kernels.h"

#if FASTLORA_NEON

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "fastlora.h"

namespace fastlora {
namespace {

#include "scalar.h"
#include "simd_neon.h"
//
#include "moment_codes.h"
// the kernels need what those above define
#include "all_kernels.h"

}  // namespace

const Kernels kNeon = kernels_of<Fp32Format>("neon");

}  // namespace fastlora

#endif  // FASTLORA_NEON
