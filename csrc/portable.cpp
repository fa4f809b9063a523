// The kernels in plain C++: any processor, Arm included.
//
// No library code with inline functions is included: see kernels.h.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "fastlora.h"
#include "kernels.h"

namespace fastlora {
namespace {

#include "scalar.h"
#include "simd_portable.h"
// the kernels need what the two above define
#include "all_kernels.h"

}  // namespace

const Kernels kPortable = kernels_of<Fp32Format>("portable");

}  // namespace fastlora
