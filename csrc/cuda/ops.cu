// CUDA kernels of vllm_pedro's operators; schemas and CPU kernels are in ../ops.cpp, and what each
// operator means stands in vllm_pedro/ops/reference.py.
//
// All arithmetic is in float32. Memory is read and written 16 bytes at a time where widths and
// addresses allow it. Counts are read on the host (`counts` lies on the CPU), so a step with nothing
// to do launches nothing, and nothing waits for the device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../layout.h"

namespace vllm_pedro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kScaleRanges = 3;
// Most blocks that share one prompt's mean or maximum, and how many blocks are worth launching.
constexpr int64_t kSplits = 32;
constexpr int64_t kPoolBlocks = 512;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

// N elements that are moved in one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

struct Ranges {
  int64_t x[kScaleRanges], vectors[kScaleRanges], width[kScaleRanges];
};

// One block for each token and kThreads packs of the ranges' columns, laid side by side.
template <typename T, int N>
__global__ void scale_kernel(
    T* x,
    const T* __restrict__ vectors,
    const int64_t* __restrict__ token_rows,
    int64_t x_stride,
    int64_t vectors_stride,
    Ranges ranges) {
  const int64_t token = blockIdx.x;
  const int64_t row = token_rows[token];
  if (row == 0) return;
  int64_t j = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  // Indices that the compiler knows: with others each thread copies the ranges to local memory.
  int64_t column = -1, by_column = 0;
#pragma unroll
  for (int range = 0; range < kScaleRanges; ++range) {
    if (column < 0 && j < ranges.width[range]) {
      column = ranges.x[range] + j;
      by_column = ranges.vectors[range] + j;
    }
    j -= ranges.width[range];
  }
  if (column < 0) return;
  using P = Pack<T, N>;
  P* at = reinterpret_cast<P*>(x + token * x_stride + column);
  P value = *at;
  const P by = *reinterpret_cast<const P*>(vectors + row * vectors_stride + by_column);
#pragma unroll
  for (int i = 0; i < N; ++i)
    value.values[i] = from_float<T>(to_float(value.values[i]) * (1.0f + to_float(by.values[i])));
  *at = value;
}

struct GeluErf {
  static __device__ __forceinline__ float apply(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  }
};
// Sum over a block of kThreads, in every thread.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
  return total;
}

// The pooled state of one share of one prompt's tokens: `partial` [prompts, splits, d]. With the
// pooling "last" the whole of it is in share 0.
template <typename T>
__global__ void pool_kernel(
    float* __restrict__ partial,
    const T* __restrict__ hidden,
    const unsigned char* __restrict__ arena,
    const int32_t* __restrict__ prefills,
    int64_t hidden_stride,
    int64_t hidden_size,
    int64_t layer) {
  const int64_t prompt = blockIdx.x, share = blockIdx.y, splits = gridDim.y;
  const int32_t* fields = prefills + prompt * kPrefillFields;
  const Record record = record_of(arena, fields[kPlace], layer);
  if (record.rank() == 0) return;  // static vectors, or none
  const int64_t pooling = record[kPooling];
  const bool norm = record[kInputNorm] != 0;
  const int64_t length = fields[kLength];
  const int64_t each = (length + splits - 1) / splits;
  int64_t first = share * each, end = min(first + each, length);
  if (pooling == kLast) {
    first = share == 0 ? length - 1 : length;
    end = length;
  }
  float* out = partial + (prompt * splits + share) * hidden_size;
  for (int64_t j = threadIdx.x; j < hidden_size; j += kThreads)
    out[j] = pooling == kMax ? -INFINITY : 0.0f;
  for (int64_t t = first; t < end; ++t) {
    const T* h = hidden + (fields[kStart] + t) * hidden_stride;
    float factor = 1.0f;
    if (norm) {
      float squares = 0.0f;
      for (int64_t j = threadIdx.x; j < hidden_size; j += kThreads)
        squares += to_float(h[j]) * to_float(h[j]);
      squares = block_sum(squares);
      factor = rsqrtf(squares / static_cast<float>(hidden_size) + 1e-6f);
    }
    // Each thread has columns of its own, so nothing is to be synchronised.
    for (int64_t j = threadIdx.x; j < hidden_size; j += kThreads) {
      const float x = to_float(h[j]) * factor;
      if (pooling == kMax)
        out[j] = (x > out[j] || x != x) ? x : out[j];  // NaN wins, as it does in torch
      else
        out[j] += x;
    }
  }
}

__device__ __forceinline__ float horner(const float* coefficients, int count, float x) {
  float result = coefficients[count - 1];
  for (int i = count - 2; i >= 0; --i) result = result * x + coefficients[i];
  return result;
}

// W_down[k] times a pooled prompt: a thread's share of the sum.
template <typename W>
__device__ __forceinline__ float dot_share(
    const W* __restrict__ w,
    const float* __restrict__ partial,
    int64_t hidden_size,
    int64_t shares,
    int64_t pooling,
    float length) {
  float sum = 0.0f;
  for (int64_t j = threadIdx.x; j < hidden_size; j += kThreads) {
    const float* p = partial + j;
    float pooled = p[0];
    for (int64_t share = 1; share < shares; ++share) {
      const float other = p[share * hidden_size];
      if (pooling == kMax)
        pooled = (other > pooled || other != other) ? other : pooled;
      else
        pooled += other;
    }
    if (pooling == kMean) pooled /= length;
    sum += to_float(w[j]) * pooled;
  }
  return sum;
}

// g(p @ W_down + b_down)[k] of one prompt: `latent` [prompts, highest rank].
__global__ void latent_kernel(
    float* __restrict__ latent,
    const float* __restrict__ partial,
    const unsigned char* __restrict__ arena,
    const int32_t* __restrict__ prefills,
    int64_t splits,
    int64_t hidden_size,
    int64_t layer) {
  const int64_t prompt = blockIdx.x, k = blockIdx.y;
  const int32_t* fields = prefills + prompt * kPrefillFields;
  const Record record = record_of(arena, fields[kPlace], layer);
  if (k >= record.rank()) return;
  const int64_t pooling = record[kPooling];
  const int64_t shares = pooling == kLast ? 1 : splits;
  const float length = static_cast<float>(fields[kLength]);
  const float* p = partial + prompt * splits * hidden_size;
  const int64_t row = k * hidden_size;
  float sum;
  switch (record[kDtype]) {
    case kFloat32:
      sum = dot_share(record.part<float>(kDown) + row, p, hidden_size, shares, pooling, length);
      break;
    case kBfloat16:
      sum = dot_share(
          record.part<__nv_bfloat16>(kDown) + row, p, hidden_size, shares, pooling, length);
      break;
    default:
      sum = dot_share(record.part<__half>(kDown) + row, p, hidden_size, shares, pooling, length);
  }
  const float x = block_sum(sum) + record.part<float>(kDownBias)[k];
  if (threadIdx.x != 0) return;
  const int64_t kind = record[kActivation];
  float y;
  if (kind == kGelu) {
    y = GeluErf::apply(x);
  } else if (kind == kRelu) {
    y = x > 0.0f || x != x ? x : 0.0f;
  } else {
    const int m = static_cast<int>(record[kNumeratorDegree]);
    const int n = static_cast<int>(record[kDenominatorDegree]);
    y = horner(record.numerator(), m + 1, x) / (1.0f + fabsf(x * horner(record.denominator(), n, x)));
  }
  latent[prompt * gridDim.y + k] = y;
}

// (latent @ W_up + (b_up - 1))[j].
template <typename W>
__device__ __forceinline__ float column(
    const Record& record, const float* __restrict__ latent, int64_t j) {
  const W* up = record.part<W>(kUp) + j;
  const int64_t rank = record.rank(), columns = record[kColumns];
  float sum = 0.0f;
  for (int64_t k = 0; k < rank; ++k) sum += latent[k] * to_float(up[k * columns]);
  return sum + (to_float(record.part<W>(kBias)[j]) - 1.0f);
}

// One prompt's vectors less 1, into its row of the store: 0 where the adapter has no columns.
template <typename T>
__global__ void columns_kernel(
    T* __restrict__ vectors,
    const float* __restrict__ latent,
    const unsigned char* __restrict__ arena,
    const int32_t* __restrict__ prefills,
    int64_t width,
    int64_t max_rank,
    int64_t layer) {
  const int64_t prompt = blockIdx.x;
  const int64_t j = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (j >= width) return;
  const int32_t* fields = prefills + prompt * kPrefillFields;
  const Record record = record_of(arena, fields[kPlace], layer);
  int64_t source = -1, before = 0;
  for (int64_t i = 0; i < record.num_ranges(); ++i) {
    const int64_t first = record.ranges()[2 * i], size = record.ranges()[2 * i + 1];
    if (j >= first && j < first + size) source = before + j - first;
    before += size;
  }
  float value = 0.0f;
  const float* own = latent + prompt * max_rank;
  if (source >= 0) {
    switch (record[kDtype]) {
      case kFloat32: value = column<float>(record, own, source); break;
      case kBfloat16: value = column<__nv_bfloat16>(record, own, source); break;
      default: value = column<__half>(record, own, source);
    }
  }
  vectors[fields[kRow] * width + j] = from_float<T>(value);
}

static cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
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
      token_rows.dim() == 1 && token_rows.scalar_type() == ScalarType::Long &&
          token_rows.size(0) >= x.size(0),
      "token_rows must be int64, with an entry for each token");
  STD_TORCH_CHECK(
      vectors.is_cuda() && token_rows.is_cuda(), "all but counts must be on the same CUDA device");
}

static void check_column(int64_t column, int64_t width, const Tensor& vectors) {
  STD_TORCH_CHECK(
      column >= -1 && (column < 0 || column + width <= vectors.size(1)),
      "columns ", column, " to ", column + width, " lie outside of vectors");
}

// Calls f with a value of the tensor's type.
template <typename F>
static void by_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

static bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

static void generate_vectors(
    const Tensor& hidden,
    Tensor vectors,
    const Tensor& arena,
    const Tensor& prefills,
    const Tensor& layer,
    const Tensor& counts) {
  const int64_t count = counts_of(counts)[0];
  if (count == 0) return;
  STD_TORCH_CHECK(
      hidden.dim() == 2 && (hidden.stride(1) == 1 || hidden.size(1) <= 1),
      "hidden must be [tokens, d] with contiguous rows");
  STD_TORCH_CHECK(
      vectors.dim() == 2 && vectors.is_contiguous() && vectors.scalar_type() == hidden.scalar_type(),
      "vectors must be a contiguous [rows, D] in the dtype of hidden");
  STD_TORCH_CHECK(
      arena.dim() == 1 && arena.is_contiguous() && arena.scalar_type() == ScalarType::Byte &&
          aligned(arena.const_data_ptr()),
      "arena must be contiguous uint8 that begins at a multiple of 16 bytes");
  STD_TORCH_CHECK(
      prefills.dim() == 2 && prefills.is_contiguous() && prefills.scalar_type() == ScalarType::Int &&
          prefills.size(1) == kPrefillFields && prefills.size(0) >= count,
      "prefills must be a contiguous int32 [>= ", count, ", 4]");
  STD_TORCH_CHECK(
      layer.is_cpu() && layer.scalar_type() == ScalarType::Int && layer.numel() == 1,
      "layer must be 1 int32 on the CPU");
  STD_TORCH_CHECK(
      vectors.is_cuda() && arena.is_cuda() && prefills.is_cuda(),
      "all but layer and counts must be on the same CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const cudaStream_t stream = current_stream(hidden);
  const int64_t hidden_size = hidden.size(1), width = vectors.size(1);
  const int64_t rank = counts_of(counts)[2];
  const int64_t index = *static_cast<const int32_t*>(layer.const_data_ptr());
  const int64_t splits = std::max<int64_t>(1, std::min(kSplits, kPoolBlocks / count));
  Tensor partial =
      torch::stable::new_empty(hidden, {count, splits, hidden_size}, ScalarType::Float);
  Tensor latent =
      torch::stable::new_empty(hidden, {count, std::max<int64_t>(1, rank)}, ScalarType::Float);
  float* partials = static_cast<float*>(partial.mutable_data_ptr());
  float* latents = static_cast<float*>(latent.mutable_data_ptr());
  const unsigned char* blobs = static_cast<const unsigned char*>(arena.const_data_ptr());
  const int32_t* fields = static_cast<const int32_t*>(prefills.const_data_ptr());
  const unsigned n = static_cast<unsigned>(count);
  by_type(hidden, [&](auto type) {
    using T = decltype(type);
    if (rank > 0) {
      pool_kernel<T><<<dim3(n, static_cast<unsigned>(splits)), kThreads, 0, stream>>>(
          partials, static_cast<const T*>(hidden.const_data_ptr()), blobs, fields,
          hidden.stride(0), hidden_size, index);
      latent_kernel<<<dim3(n, static_cast<unsigned>(rank)), kThreads, 0, stream>>>(
          latents, partials, blobs, fields, splits, hidden_size, index);
    }
    const unsigned blocks = static_cast<unsigned>((width + kThreads - 1) / kThreads);
    columns_kernel<T><<<dim3(n, blocks), kThreads, 0, stream>>>(
        static_cast<T*>(vectors.mutable_data_ptr()), latents, blobs, fields, width, rank, index);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

static void scale_columns_(
    Tensor projection,
    const Tensor& vectors,
    const Tensor& token_rows,
    std::vector<int64_t> flat,
    const Tensor& counts) {
  if (counts_of(counts)[1] == 0 || projection.size(0) == 0) return;
  check_rows(projection, vectors, token_rows);
  STD_TORCH_CHECK(flat.size() % 3 == 0, "ranges must be triples: column, vector column, width");
  const torch::stable::accelerator::DeviceGuard guard(projection.get_device_index());
  const cudaStream_t stream = current_stream(projection);
  for (size_t begin = 0; begin < flat.size(); begin += 3 * kScaleRanges) {
    Ranges ranges{};
    int64_t total = 0, offsets = 0;
    for (size_t i = 0; i < kScaleRanges && begin + 3 * i < flat.size(); ++i) {
      const int64_t* r = flat.data() + begin + 3 * i;
      STD_TORCH_CHECK(
          r[0] >= 0 && r[2] >= 0 && r[0] + r[2] <= projection.size(1),
          "columns ", r[0], " to ", r[0] + r[2], " lie outside of the projection");
      STD_TORCH_CHECK(r[1] >= 0, "columns of vectors must not be negative");
      check_column(r[1], r[2], vectors);
      ranges.x[i] = r[0];
      ranges.vectors[i] = r[1];
      ranges.width[i] = r[2];
      total += r[2];
      offsets |= r[0] | r[1] | r[2];
    }
    if (total == 0) continue;
    by_type(projection, [&](auto type) {
      using T = decltype(type);
      constexpr int kPack = 16 / sizeof(T);
      T* x = static_cast<T*>(projection.mutable_data_ptr());
      const T* by = static_cast<const T*>(vectors.const_data_ptr());
      const int64_t* rows = static_cast<const int64_t*>(token_rows.const_data_ptr());
      const bool wide = aligned(x) && aligned(by) &&
          (offsets | projection.stride(0) | vectors.stride(0)) % kPack == 0;
      const int64_t pack = wide ? kPack : 1;
      const int64_t each = kThreads * pack;
      const dim3 grid(
          static_cast<unsigned>(projection.size(0)), static_cast<unsigned>((total + each - 1) / each));
      if (wide)
        scale_kernel<T, kPack><<<grid, kThreads, 0, stream>>>(
            x, by, rows, projection.stride(0), vectors.stride(0), ranges);
      else
        scale_kernel<T, 1><<<grid, kThreads, 0, stream>>>(
            x, by, rows, projection.stride(0), vectors.stride(0), ranges);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

static bool has_cuda_kernels() { return true; }

}  // namespace vllm_pedro

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_pedro, m) {
  m.def("_has_cuda_kernels() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pedro, CUDA, m) {
  m.impl("generate_vectors", TORCH_BOX(&vllm_pedro::generate_vectors));
  m.impl("scale_columns_", TORCH_BOX(&vllm_pedro::scale_columns_));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_pedro, CompositeExplicitAutograd, m) {
  m.impl("_has_cuda_kernels", TORCH_BOX(&vllm_pedro::has_cuda_kernels));
}
