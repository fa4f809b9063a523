// The kernels of the instruction set in use.
#ifndef FASTLORA_ISA_H_
#define FASTLORA_ISA_H_

#include "kernels.h"

namespace fastlora {

const Kernels& kernels();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastlora

#endif  // FASTLORA_ISA_H_
