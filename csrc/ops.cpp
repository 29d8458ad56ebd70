// Schemas and CPU kernels of vllm_pedro's operators, through libtorch's stable ABI: one build loads
// on torch 2.11 and later. What each operator means stands in vllm_pedro/ops/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace vllm_pedro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

static Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  return Type::f32;
}

static const int32_t* counts_of(const Tensor& counts) {
  STD_TORCH_CHECK(
      counts.is_cpu() && counts.scalar_type() == ScalarType::Int && counts.numel() == 2,
      "counts must be 2 int32 on the CPU: prompts that generate vectors, rows with an adapter");
  return static_cast<const int32_t*>(counts.const_data_ptr());
}

static void check_rows(const Tensor& x, const Tensor& vectors, const Tensor& token_rows) {
  STD_TORCH_CHECK(
      x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1),
      "the projection must be [tokens, width] with contiguous rows");
  STD_TORCH_CHECK(
      vectors.dim() == 2 && vectors.stride(1) == 1 && vectors.scalar_type() == x.scalar_type(),
      "vectors must be [rows, D] with contiguous rows, in the dtype of the projection");
  STD_TORCH_CHECK(
      token_rows.dim() == 1 && token_rows.stride(0) == 1 &&
          token_rows.scalar_type() == ScalarType::Long && token_rows.size(0) >= x.size(0),
      "token_rows must be int64 and contiguous, with an entry for each token");
}

static void check_column(int64_t column, int64_t width, const Tensor& vectors) {
  STD_TORCH_CHECK(
      column >= -1 && (column < 0 || column + width <= vectors.size(1)),
      "columns ", column, " to ", column + width, " lie outside of vectors");
}

static void generate_vectors(
    const Tensor& hidden,
    Tensor vectors,
    const Tensor& generators,
    const Tensor& prefills,
    const Tensor& counts) {
  const int64_t count = counts_of(counts)[0];
  if (count == 0) return;
  const Type type = type_of(hidden, "hidden");
  STD_TORCH_CHECK(
      hidden.dim() == 2 && (hidden.stride(1) == 1 || hidden.size(1) <= 1),
      "hidden must be [tokens, d] with contiguous rows");
  STD_TORCH_CHECK(
      vectors.dim() == 2 && vectors.is_contiguous() && vectors.scalar_type() == hidden.scalar_type(),
      "vectors must be a contiguous [rows, D] in the dtype of hidden");
  STD_TORCH_CHECK(
      generators.dim() == 2 && generators.is_contiguous() &&
          generators.scalar_type() == ScalarType::Float,
      "generators must be a contiguous float32 [slots, record]");
  STD_TORCH_CHECK(
      prefills.dim() == 2 && prefills.is_contiguous() && prefills.scalar_type() == ScalarType::Int &&
          prefills.size(1) == kPrefillFields && prefills.size(0) >= count,
      "prefills must be a contiguous int32 [>= ", count, ", 4]");
  GenerateArgs args{
      hidden.const_data_ptr(),
      hidden.stride(0),
      vectors.mutable_data_ptr(),
      static_cast<const float*>(generators.const_data_ptr()),
      static_cast<const int32_t*>(prefills.const_data_ptr()),
      Layout(hidden.size(1), vectors.size(1), generators.size(1))};
  const Layout& at = args.at;
  int64_t pooled_tokens = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* p = args.prefills + i * kPrefillFields;
    STD_TORCH_CHECK(
        p[kStart] >= 0 && p[kLength] >= 1 && p[kStart] + p[kLength] <= hidden.size(0) &&
            p[kRow] > 0 && p[kRow] < vectors.size(0) && p[kSlot] >= 0 &&
            p[kSlot] < generators.size(0),
        "prompt ", i, " lies outside of hidden, vectors or generators");
    pooled_tokens += p[kLength];
  }
  const Kernels& kernels = cpu_kernels();
  std::vector<float> latents(static_cast<size_t>(count * std::max<int64_t>(at.max_rank, 1)));
  const int64_t work = (pooled_tokens + count * at.max_rank) * at.hidden_size;
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, kGrain * count / std::max<int64_t>(work, 1)),
      [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(2 * at.hidden_size));
        for (int64_t i = begin; i < end; ++i)
          kernels.latent(args, type, i, latents.data() + i * at.max_rank, scratch.data());
      });
  // Rows of one adapter lie side by side in `prefills`, so a chunk of W_up is read from memory once.
  constexpr int64_t kChunk = 512;
  const int64_t chunks = (at.width + kChunk - 1) / kChunk;
  torch::stable::parallel_for(
      0, chunks, std::max<int64_t>(1, kGrain / (kChunk * count)),
      [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk)
          for (int64_t i = 0; i < count; ++i)
            kernels.columns(
                args, type, i, latents.data() + i * at.max_rank, chunk * kChunk,
                std::min(at.width, (chunk + 1) * kChunk));
      });
}

static void scale_columns_(
    Tensor x,
    const Tensor& vectors,
    const Tensor& token_rows,
    std::vector<int64_t> ranges,
    const Tensor& counts) {
  if (counts_of(counts)[1] == 0) return;
  const Type type = type_of(x, "the projection");
  check_rows(x, vectors, token_rows);
  STD_TORCH_CHECK(ranges.size() % 3 == 0, "ranges must be triples: column, vector column, width");
  int64_t scaled = 0;
  for (size_t i = 0; i < ranges.size(); i += 3) {
    STD_TORCH_CHECK(
        ranges[i] >= 0 && ranges[i + 2] >= 0 && ranges[i] + ranges[i + 2] <= x.size(1),
        "columns ", ranges[i], " to ", ranges[i] + ranges[i + 2], " lie outside of the projection");
    STD_TORCH_CHECK(ranges[i + 1] >= 0, "columns of vectors must not be negative");
    check_column(ranges[i + 1], ranges[i + 2], vectors);
    scaled += ranges[i + 2];
  }
  const ScaleArgs args{
      x.mutable_data_ptr(),
      x.stride(0),
      vectors.const_data_ptr(),
      vectors.stride(0),
      static_cast<const int64_t*>(token_rows.const_data_ptr()),
      ranges.data(),
      static_cast<int64_t>(ranges.size())};
  const Kernels& kernels = cpu_kernels();
  torch::stable::parallel_for(
      0, x.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(scaled, 1)),
      [&](int64_t begin, int64_t end) { kernels.scale(args, type, begin, end); });
}

static std::string instruction_set() { return cpu_instruction_set(); }

// Raised with every change of a schema or of layout.h; vllm_pedro/ops/library.py expects this one.
static int64_t interface_version() { return 3; }

}  // namespace vllm_pedro

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_pedro, m) {
  m.def(
      "generate_vectors(Tensor hidden, Tensor(a!) vectors, Tensor generators, Tensor prefills, "
      "Tensor counts) -> ()");
  m.def(
      "scale_columns_(Tensor(a!) x, Tensor vectors, Tensor token_rows, int[] ranges, "
      "Tensor counts) -> ()");
  m.def("_instruction_set() -> str");
  m.def("_interface_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pedro, CPU, m) {
  m.impl("generate_vectors", TORCH_BOX(&vllm_pedro::generate_vectors));
  m.impl("scale_columns_", TORCH_BOX(&vllm_pedro::scale_columns_));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pedro, CompositeExplicitAutograd, m) {
  m.impl("_instruction_set", TORCH_BOX(&vllm_pedro::instruction_set));
  m.impl("_interface_version", TORCH_BOX(&vllm_pedro::interface_version));
}
