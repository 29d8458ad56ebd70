// One source, compiled for several instruction sets; the choice is made at run time, so that a
// library built on one machine runs on another.
#include "cpu_kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VLLM_PEDRO_X86 1
#endif

namespace vllm_pedro {

namespace baseline {
#define VLLM_PEDRO_F16 0
#include "cpu_kernels.inl"
#undef VLLM_PEDRO_F16
}  // namespace baseline

#if VLLM_PEDRO_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define VLLM_PEDRO_F16 1
#include "cpu_kernels.inl"
#undef VLLM_PEDRO_F16
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#define VLLM_PEDRO_F16 1
#include "cpu_kernels.inl"
#undef VLLM_PEDRO_F16
}  // namespace avx512
#pragma GCC pop_options

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
}
#endif

const Kernels& cpu_kernels() {
#if VLLM_PEDRO_X86
  static const Kernels& chosen =
      has_avx512() ? avx512::kernels : has_avx2() ? avx2::kernels : baseline::kernels;
  return chosen;
#else
  return baseline::kernels;
#endif
}

const char* cpu_instruction_set() {
#if VLLM_PEDRO_X86
  return has_avx512() ? "AVX-512" : has_avx2() ? "AVX2" : "baseline x86-64";
#else
  return "baseline";
#endif
}

}  // namespace vllm_pedro
