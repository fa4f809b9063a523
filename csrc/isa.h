// The kernels of the instruction set in use.
#ifndef FASTLORA_ISA_H_
#define FASTLORA_ISA_H_

#include "kernels.h"

namespace fastlora {

const Kernels& kernels();

}  // namespace fastlora

#endif  // FASTLORA_ISA_H_
