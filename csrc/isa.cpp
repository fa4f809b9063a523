// Which kernels run: asks the CPU what it can.
#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

#include "fastlora.h"

#if FASTLORA_X86
#include <cpuid.h>
#endif
#if FASTLORA_X86_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora {
namespace {

struct Isa {
  const Kernels* kernels;
  bool runs;
};

#if FASTLORA_X86
bool has_avx2() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // F16C by hand, its name is unknown to older compilers
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if FASTLORA_X86_BF16
bool has_avx512bf16() {
#if defined(FASTLORA_EMULATE)
  return has_avx512();
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

#if FASTLORA_X86_AMX
// The processor has it, and the system keeps its registers for this process from now on.
bool has_amx() {
#if defined(FASTLORA_EMULATE)
  return has_avx512bf16();
#else
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) &&
         (d & kAmxTile) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
}

Kernels with_amx() {
  Kernels kernels = kAvx512Bf16;
  kernels.name = "amx";
  kernels.multiply[FASTLORA_BF16] = multiply_amx;
  return kernels;
}

const Kernels kAmx = with_amx();
#endif

// best first, the last one always runs
const Isa kIsas[] = {
#if FASTLORA_X86_AMX
    {&kAmx, has_amx()},
#endif
#if FASTLORA_X86_BF16
    {&kAvx512Bf16, has_avx512bf16()},
#endif
#if FASTLORA_X86
    {&kAvx512, has_avx512()},
    {&kAvx2, has_avx2()},
#endif
#if FASTLORA_NEON
    {&kNeon, true},
#endif
    {&kPortable, true},
};

const Kernels* best() {
  for (const Isa& isa : kIsas) {
    if (isa.runs) return isa.kernels;
  }
  return &kPortable;
}

std::atomic<const Kernels*> active{best()};

}  // namespace

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

}  // namespace fastlora

using namespace fastlora;

const char* fastlora_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Isa& isa : kIsas) {
      if (isa.runs) joined += (joined.empty() ? "" : ",") + std::string(isa.kernels->name);
    }
    return joined;
  }();
  return names.c_str();
}

const char* fastlora_isa(void) { return kernels().name; }

int fastlora_use_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (isa.runs && std::strcmp(isa.kernels->name, name) == 0) {
      active = isa.kernels;
      return 0;
    }
  }
  return 1;
}
