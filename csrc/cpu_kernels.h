// What the operators' CPU kernels take; addresses and strides only, strides in elements.
#pragma once

#include <cstdint>

#include "layout.h"

namespace vllm_pedro {

enum class Type { f32, bf16, f16 };

struct ScaleArgs {
  void* x;
  int64_t x_stride;
  const void* vectors;
  int64_t vectors_stride;
  const int64_t* token_rows;
  const int64_t* ranges;
  int64_t num_ranges;
};

struct GenerateArgs {
  const void* hidden;
  int64_t hidden_stride;
  int64_t hidden_size;
  void* vectors;
  int64_t width;
  const unsigned char* arena;
  const int32_t* prefills;
  int64_t layer;

  Record record(int64_t prompt) const {
    return record_of(arena, prefills[prompt * kPrefillFields + kPlace], layer);
  }
};

struct Kernels {
  void (*scale)(const ScaleArgs&, Type, int64_t begin, int64_t end);
  void (*latent)(const GenerateArgs&, Type, int64_t prompt, float* out, float* scratch);
  void (*columns)(
      const GenerateArgs&, Type, int64_t prompt, const float* latent, int64_t begin, int64_t end);
};

// The widest instruction set that this processor has.
const Kernels& cpu_kernels();
const char* cpu_instruction_set();

}  // namespace vllm_pedro
