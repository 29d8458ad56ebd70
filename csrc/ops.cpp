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
      counts.is_cpu() && counts.scalar_type() == ScalarType::Int && counts.numel() == 3,
      "counts must be 3 int32 on the CPU: prompts that generate vectors, rows with an adapter, rank");
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

// Whether a blob with a generator for this layer lies inside the arena, and is one that the operator's
// other arguments go with.
static bool is_sound(const GenerateArgs& args, int64_t place, int64_t arena_bytes, int64_t max_rank) {
  const int64_t units = arena_bytes / kUnit;
  if (place < 0 || place * kUnit + 4 * kBlobWords > arena_bytes) return false;
  const int32_t* blob = reinterpret_cast<const int32_t*>(args.arena + place * kUnit);
  const int64_t size = blob[kBlobUnits];
  if (blob[kBlobMagic] != kMagic || size < 0 || size > units - place) return false;
  if (args.layer < 0 || args.layer >= blob[kBlobLayers]) return false;
  if (4 * (kBlobWords + blob[kBlobLayers]) > size * kUnit) return false;
  const int64_t offset = blob[kBlobWords + args.layer];
  if (offset == 0) return true;
  const int64_t bytes = (size - offset) * kUnit;  // to the blob's end
  if (offset < 0 || bytes < 4 * kWeightsAt) return false;
  const Record record = record_of(args.arena, place, args.layer);
  const auto within = [](int64_t x, int64_t most) { return x >= 0 && x <= most; };
  const int64_t rank = record.rank(), columns = record[kColumns];
  if (!within(record[kDtype], kFloat16) || !within(record[kActivation], kRational) ||
      !within(record[kPooling], kMax) || !within(record[kNumeratorDegree], kMaxOrder) ||
      !within(record[kDenominatorDegree], kMaxOrder) || record[kDenominatorDegree] == 0 ||
      !within(record[kRanges], kMaxRanges) || !within(rank, max_rank) ||
      !within(columns, args.width) || (rank > 0 && record[kHiddenSize] != args.hidden_size))
    return false;
  int64_t end = 0, total = 0;
  for (int64_t i = 0; i < record.num_ranges(); ++i) {
    const int64_t column = record.ranges()[2 * i], width = record.ranges()[2 * i + 1];
    if (column < end || width < 0 || column + width > args.width) return false;
    end = column + width;
    total += width;
  }
  const int64_t element = record[kDtype] == kFloat32 ? 4 : 2;
  const auto fits = [&](RecordField part, int64_t part_bytes) {
    return record[part] >= 0 && record[part] * kUnit + part_bytes <= bytes;
  };
  return total == columns && fits(kDownBias, 4 * rank) && fits(kBias, element * columns) &&
      fits(kDown, element * rank * args.hidden_size) && fits(kUp, element * rank * columns);
}

static void generate_vectors(
    const Tensor& hidden,
    Tensor vectors,
    const Tensor& arena,
    const Tensor& prefills,
    const Tensor& layer,
    const Tensor& counts) {
  const int64_t count = counts_of(counts)[0], max_rank = counts_of(counts)[2];
  if (count == 0) return;
  const Type type = type_of(hidden, "hidden");
  STD_TORCH_CHECK(
      hidden.dim() == 2 && (hidden.stride(1) == 1 || hidden.size(1) <= 1),
      "hidden must be [tokens, d] with contiguous rows");
  STD_TORCH_CHECK(
      vectors.dim() == 2 && vectors.is_contiguous() && vectors.scalar_type() == hidden.scalar_type(),
      "vectors must be a contiguous [rows, D] in the dtype of hidden");
  STD_TORCH_CHECK(
      arena.dim() == 1 && arena.is_contiguous() && arena.scalar_type() == ScalarType::Byte &&
          reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % kUnit == 0,
      "arena must be contiguous uint8 that begins at a multiple of 16 bytes");
  STD_TORCH_CHECK(
      prefills.dim() == 2 && prefills.is_contiguous() && prefills.scalar_type() == ScalarType::Int &&
          prefills.size(1) == kPrefillFields && prefills.size(0) >= count,
      "prefills must be a contiguous int32 [>= ", count, ", 4]");
  STD_TORCH_CHECK(
      layer.is_cpu() && layer.scalar_type() == ScalarType::Int && layer.numel() == 1,
      "layer must be 1 int32 on the CPU");
  GenerateArgs args{
      hidden.const_data_ptr(),
      hidden.stride(0),
      hidden.size(1),
      vectors.mutable_data_ptr(),
      vectors.size(1),
      static_cast<const unsigned char*>(arena.const_data_ptr()),
      static_cast<const int32_t*>(prefills.const_data_ptr()),
      *static_cast<const int32_t*>(layer.const_data_ptr())};
  int64_t pooled_tokens = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* p = args.prefills + i * kPrefillFields;
    STD_TORCH_CHECK(
        p[kStart] >= 0 && p[kLength] >= 1 && p[kStart] + p[kLength] <= hidden.size(0) &&
            p[kRow] > 0 && p[kRow] < vectors.size(0),
        "prompt ", i, " lies outside of hidden or vectors");
    STD_TORCH_CHECK(
        is_sound(args, p[kPlace], arena.numel(), max_rank),
        "the arena has no generator of layer ", args.layer, " for prompt ", i);
    pooled_tokens += p[kLength];
  }
  const Kernels& kernels = cpu_kernels();
  const int64_t stride = std::max<int64_t>(max_rank, 1);
  std::vector<float> latents(static_cast<size_t>(count * stride));
  const int64_t work = (pooled_tokens + count * max_rank) * args.hidden_size;
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, kGrain * count / std::max<int64_t>(work, 1)),
      [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(2 * args.hidden_size));
        for (int64_t i = begin; i < end; ++i)
          kernels.latent(args, type, i, latents.data() + i * stride, scratch.data());
      });
  // Rows of one adapter lie side by side in `prefills`, so a chunk of W_up is read from memory once.
  constexpr int64_t kChunk = 512;
  const int64_t chunks = (args.width + kChunk - 1) / kChunk;
  torch::stable::parallel_for(
      0, chunks, std::max<int64_t>(1, kGrain / (kChunk * count)),
      [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk)
          for (int64_t i = 0; i < count; ++i)
            kernels.columns(
                args, type, i, latents.data() + i * stride, chunk * kChunk,
                std::min(args.width, (chunk + 1) * kChunk));
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
static int64_t interface_version() { return 5; }

}  // namespace vllm_pedro

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_pedro, m) {
  m.def(
      "generate_vectors(Tensor hidden, Tensor(a!) vectors, Tensor arena, Tensor prefills, "
      "Tensor layer, Tensor counts) -> ()");
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
