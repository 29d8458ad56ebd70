// As much of CUDA as csrc/cuda/ops.cu uses, on a CPU: blocks run one after the other, and a block's
// threads as fibers that change places at barriers. test_cuda_on_cpu.py includes it in place of
// CUDA's headers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static

using std::min;

struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1) : x(x_), y(y_) {}
};

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;

inline float __half2float(__half x) { return static_cast<float>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct Block {
  static constexpr unsigned kMost = 256;
  static constexpr size_t kStack = 64 << 10;

  dim3 grid, index, thread;
  unsigned size = 0, running = 0;
  bool fibers = false;
  bool done[kMost];
  float shuffled[kMost];
  ucontext_t scheduler, contexts[kMost];
  std::unique_ptr<char[]> stacks{new char[kMost * kStack]};
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  long barriers = 0;
};

inline Block& block() {
  static Block the_block;
  return the_block;
}

#define threadIdx (block().thread)
#define blockIdx (block().index)
#define gridDim (block().grid)

inline void fiber_main() {
  Block& b = block();
  b.call(b.arguments);
  b.done[b.running] = true;
  swapcontext(&b.contexts[b.running], &b.scheduler);
}

// Every thread of the block gets here before any goes on.
inline void __syncthreads() {
  Block& b = block();
  if (!b.fibers) {
    std::fprintf(stderr, "a barrier in a kernel that was said to have none\n");
    std::abort();
  }
  ++b.barriers;
  swapcontext(&b.contexts[b.running], &b.scheduler);
}

// All threads of a block call it together here, which the kernels do.
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  Block& b = block();
  const unsigned me = b.thread.x;
  b.shuffled[me] = value;
  __syncthreads();
  const float other = b.shuffled[me ^ static_cast<unsigned>(mask)];
  __syncthreads();
  return other;
}

// Runs threads forwards, or backwards with CUDA_ON_CPU_BACKWARDS: what needs a barrier that is not
// there comes out differently in one of the two.
template <typename F>
void launch(dim3 grid, unsigned threads, bool has_barriers, F kernel) {
  static const bool backwards = std::getenv("CUDA_ON_CPU_BACKWARDS") != nullptr;
  Block& b = block();
  b.grid = grid;
  b.size = threads;
  b.fibers = has_barriers;
  b.call = [](void* f) { (*static_cast<F*>(f))(); };
  b.arguments = &kernel;
  for (b.index.y = 0; b.index.y < grid.y; ++b.index.y) {
    for (b.index.x = 0; b.index.x < grid.x; ++b.index.x) {
      if (!has_barriers) {
        for (unsigned i = 0; i < threads; ++i) {
          b.thread.x = backwards ? threads - 1 - i : i;
          kernel();
        }
        continue;
      }
      for (unsigned i = 0; i < threads; ++i) {
        b.done[i] = false;
        getcontext(&b.contexts[i]);
        b.contexts[i].uc_stack.ss_sp = b.stacks.get() + i * Block::kStack;
        b.contexts[i].uc_stack.ss_size = Block::kStack;
        b.contexts[i].uc_link = nullptr;
        makecontext(&b.contexts[i], fiber_main, 0);
      }
      for (unsigned left = threads; left > 0;) {
        const long before = b.barriers;
        unsigned ended = 0;
        for (unsigned i = 0; i < threads; ++i) {
          const unsigned me = backwards ? threads - 1 - i : i;
          if (b.done[me]) continue;
          b.running = b.thread.x = me;
          swapcontext(&b.scheduler, &b.contexts[me]);
          ended += b.done[me];
        }
        if (ended != 0 && b.barriers != before) {
          std::fprintf(stderr, "some threads of a block ended where others wait\n");
          std::abort();
        }
        left -= ended;
      }
    }
  }
}
