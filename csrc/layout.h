// How one adapter slot's generator of one layer lies in memory; the Python side of it is
// vllm_pedro/ops/layout.py (GeneratorLayout). All float32:
//   header [8]: activation, rank r, numerator degree m, denominator degree n, pooling, input norm
//   W_down [max_rank, d]   W_up transposed [max_rank, D]   b_up [D]
//   numerator [33]   denominator [32]   padding to a multiple of 4
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VLLM_PEDRO_DEVICE __host__ __device__
#else
#define VLLM_PEDRO_DEVICE
#endif

namespace vllm_pedro {

constexpr int64_t kHeader = 8;
constexpr int64_t kNumerator = 33;
constexpr int64_t kDenominator = 32;

enum Activation { kGelu = 0, kRelu = 1, kRational = 2 };
enum Pooling { kLast = 0, kMean = 1, kMax = 2 };

// Columns of `prefills`, [max prefills, 4] int32.
enum PrefillField { kStart = 0, kLength = 1, kRow = 2, kSlot = 3, kPrefillFields = 4 };

struct Layout {
  int64_t hidden_size, width, max_rank, record;

  Layout(int64_t hidden_size_, int64_t width_, int64_t record_)
      : hidden_size(hidden_size_),
        width(width_),
        max_rank((record_ - kHeader - width_ - kNumerator - kDenominator) / (hidden_size_ + width_)),
        record(record_) {}

  VLLM_PEDRO_DEVICE int64_t down() const { return kHeader; }
  VLLM_PEDRO_DEVICE int64_t up() const { return down() + max_rank * hidden_size; }
  VLLM_PEDRO_DEVICE int64_t bias() const { return up() + max_rank * width; }
  VLLM_PEDRO_DEVICE int64_t numerator() const { return bias() + width; }
  VLLM_PEDRO_DEVICE int64_t denominator() const { return numerator() + kNumerator; }
};

}  // namespace vllm_pedro
