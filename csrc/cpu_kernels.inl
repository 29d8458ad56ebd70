// The CPU kernels, compiled once for each instruction set (see cpu_kernels.cpp). Loops are written
// so that the compiler vectorises them: fixed-width accumulators, no branches, no aliasing.

struct Bf16 {
  uint16_t bits;
};

// Storage that the compiler cannot vectorise as a conversion by itself gets one that is plain
// integer arithmetic: round to nearest even, NaN stays NaN. The same bits as torch.
inline float load(float x) { return x; }
inline float load(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline void store(float* at, float x) { *at = x; }
inline void store(Bf16* at, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  at->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

#if VLLM_PEDRO_F16
using F16 = _Float16;
inline float load(F16 x) { return static_cast<float>(x); }
inline void store(F16* at, float x) { *at = static_cast<F16>(x); }
#else
struct F16 {
  c10::Half value;
};
inline float load(F16 x) { return static_cast<float>(x.value); }
inline void store(F16* at, float x) { at->value = c10::Half(x); }
#endif

constexpr int64_t kLanes = 64;

template <typename T>
void scale_row(T* __restrict x, const T* __restrict by, int64_t width) {
  for (int64_t j = 0; j < width; ++j) store(x + j, load(x[j]) * (1.0f + load(by[j])));
}

template <typename Get>
inline float reduce(int64_t width, Get get) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += get(j + k);
  float rest = 0.0f;
  for (; j < width; ++j) rest += get(j);
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t k = 0; k < step; ++k) lanes[k] += lanes[k + step];
  return lanes[0] + rest;
}

// 1 / sqrt(mean(h^2) + 1e-6), or 1 without an input norm.
template <typename T>
float norm_factor(const T* h, int64_t width, bool norm) {
  if (!norm) return 1.0f;
  const float squares = reduce(width, [h](int64_t j) { return load(h[j]) * load(h[j]); });
  return 1.0f / std::sqrt(squares / static_cast<float>(width) + 1e-6f);
}

// The prompt's pooled hidden state, float32; `block` is scratch of the same width.
template <typename T>
void pool(
    float* __restrict pooled,
    float* __restrict block,
    const T* hidden,
    int64_t stride,
    int64_t length,
    int64_t width,
    int pooling,
    bool norm) {
  if (pooling == kLast) {
    const T* h = hidden + (length - 1) * stride;
    const float f = norm_factor(h, width, norm);
    for (int64_t j = 0; j < width; ++j) pooled[j] = load(h[j]) * f;
    return;
  }
  if (pooling == kMax) {
    for (int64_t j = 0; j < width; ++j) pooled[j] = -INFINITY;
    for (int64_t t = 0; t < length; ++t) {
      const T* h = hidden + t * stride;
      const float f = norm_factor(h, width, norm);
      for (int64_t j = 0; j < width; ++j) {
        const float x = load(h[j]) * f;
        // NaN wins, as it does in torch.
        pooled[j] = (x > pooled[j] || x != x) ? x : pooled[j];
      }
    }
    return;
  }
  // A mean in blocks, so that the error of long prompts does not grow with their length.
  constexpr int64_t kBlock = 128;
  for (int64_t j = 0; j < width; ++j) pooled[j] = 0.0f;
  for (int64_t first = 0; first < length; first += kBlock) {
    for (int64_t j = 0; j < width; ++j) block[j] = 0.0f;
    const int64_t end = first + kBlock < length ? first + kBlock : length;
    for (int64_t t = first; t < end; ++t) {
      const T* h = hidden + t * stride;
      const float f = norm_factor(h, width, norm);
      for (int64_t j = 0; j < width; ++j) block[j] += load(h[j]) * f;
    }
    for (int64_t j = 0; j < width; ++j) pooled[j] += block[j];
  }
  const float by = 1.0f / static_cast<float>(length);
  for (int64_t j = 0; j < width; ++j) pooled[j] *= by;
}

inline float horner(const float* coefficients, int64_t count, float x) {
  float result = coefficients[count - 1];
  for (int64_t i = count - 2; i >= 0; --i) result = result * x + coefficients[i];
  return result;
}

inline float activate(float x, int kind, const float* a, int64_t m, const float* b, int64_t n) {
  if (kind == kRelu) return x > 0.0f || x != x ? x : 0.0f;
  if (kind == kGelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  return horner(a, m + 1, x) / (1.0f + std::fabs(x * horner(b, n, x)));
}

// Calls f with a null pointer to the type that a record's weights have.
template <typename F>
void by_dtype(int64_t dtype, F f) {
  if (dtype == kFloat32) f(static_cast<const float*>(nullptr));
  else if (dtype == kBfloat16) f(static_cast<const Bf16*>(nullptr));
  else f(static_cast<const F16*>(nullptr));
}

// g(p @ W_down + b_down) of one prompt: `latent` [r]; `scratch` is of twice the hidden size.
template <typename T>
void generate_latent(
    float* latent,
    float* scratch,
    const T* hidden,
    int64_t stride,
    int64_t hidden_size,
    const int32_t* prompt,
    const Record& record) {
  const int64_t rank = record.rank();
  if (rank == 0) return;
  float* pooled = scratch;
  pool(
      pooled,
      scratch + hidden_size,
      hidden + prompt[kStart] * stride,
      stride,
      prompt[kLength],
      hidden_size,
      static_cast<int>(record[kPooling]),
      record[kInputNorm] != 0);
  const float* bias = record.part<float>(kDownBias);
  by_dtype(record[kDtype], [&](auto type) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (int64_t k = 0; k < rank; ++k) {
      const W* w = record.part<W>(kDown) + k * hidden_size;
      const float x =
          reduce(hidden_size, [w, pooled](int64_t j) { return load(w[j]) * pooled[j]; }) + bias[k];
      latent[k] = activate(
          x,
          static_cast<int>(record[kActivation]),
          record.numerator(),
          record[kNumeratorDegree],
          record.denominator(),
          record[kDenominatorDegree]);
    }
  });
}

template <typename T>
void fill_zeros(T* row, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) store(row + j, 0.0f);
}

// `width` columns of latent @ W_up + (b_up - 1), whose rows are `stride` apart.
template <typename T, typename W>
void write_block(
    T* __restrict out,
    const float* __restrict latent,
    const W* __restrict up,
    const W* __restrict bias,
    int64_t rank,
    int64_t stride,
    int64_t width) {
  for (int64_t first = 0; first < width; first += kLanes) {
    float sums[kLanes] = {};
    const int64_t count = width - first < kLanes ? width - first : kLanes;
    if (count == kLanes) {
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = 0; j < kLanes; ++j) sums[j] += latent[k] * load(up[k * stride + first + j]);
      for (int64_t j = 0; j < kLanes; ++j) store(out + first + j, sums[j] + (load(bias[first + j]) - 1.0f));
    } else {
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = 0; j < count; ++j) sums[j] += latent[k] * load(up[k * stride + first + j]);
      for (int64_t j = 0; j < count; ++j) store(out + first + j, sums[j] + (load(bias[first + j]) - 1.0f));
    }
  }
}

// Columns [begin, end) of the store's row: latent @ W_up + (b_up - 1), and 0 where the adapter has none.
template <typename T>
void write_columns(T* row, const float* latent, const Record& record, int64_t begin, int64_t end) {
  const int32_t* pair = record.ranges();
  int64_t done = begin, source = 0;
  for (int64_t i = 0; i < record.num_ranges(); ++i, pair += 2) {
    const int64_t column = pair[0], width = pair[1];
    const int64_t first = column > begin ? column : begin;
    const int64_t last = column + width < end ? column + width : end;
    if (first < last) {
      fill_zeros(row, done, first);
      by_dtype(record[kDtype], [&](auto type) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        const int64_t at = source + first - column;
        write_block(
            row + first, latent, record.part<W>(kUp) + at, record.part<W>(kBias) + at,
            record.rank(), record[kColumns], last - first);
      });
      done = last;
    }
    source += width;
  }
  fill_zeros(row, done, end);
}

template <typename T>
void scale_tokens(const ScaleArgs& a, int64_t begin, int64_t end) {
  T* x = static_cast<T*>(a.x);
  const T* vectors = static_cast<const T*>(a.vectors);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = a.token_rows[t];
    if (row == 0) continue;
    for (int64_t i = 0; i + 2 < a.num_ranges; i += 3)
      scale_row(
          x + t * a.x_stride + a.ranges[i],
          vectors + row * a.vectors_stride + a.ranges[i + 1],
          a.ranges[i + 2]);
  }
}

void scale(const ScaleArgs& a, Type type, int64_t begin, int64_t end) {
  if (type == Type::f32) scale_tokens<float>(a, begin, end);
  else if (type == Type::bf16) scale_tokens<Bf16>(a, begin, end);
  else scale_tokens<F16>(a, begin, end);
}

template <typename T>
void latent_of(const GenerateArgs& a, int64_t prompt, float* latent, float* scratch) {
  generate_latent(
      latent,
      scratch,
      static_cast<const T*>(a.hidden),
      a.hidden_stride,
      a.hidden_size,
      a.prefills + prompt * kPrefillFields,
      a.record(prompt));
}

void latent(const GenerateArgs& a, Type type, int64_t prompt, float* out, float* scratch) {
  if (type == Type::f32) latent_of<float>(a, prompt, out, scratch);
  else if (type == Type::bf16) latent_of<Bf16>(a, prompt, out, scratch);
  else latent_of<F16>(a, prompt, out, scratch);
}

template <typename T>
void columns_of(const GenerateArgs& a, int64_t prompt, const float* latent, int64_t b, int64_t e) {
  const int64_t row = a.prefills[prompt * kPrefillFields + kRow];
  write_columns(static_cast<T*>(a.vectors) + row * a.width, latent, a.record(prompt), b, e);
}

void columns(
    const GenerateArgs& a, Type type, int64_t prompt, const float* latent, int64_t b, int64_t e) {
  if (type == Type::f32) columns_of<float>(a, prompt, latent, b, e);
  else if (type == Type::bf16) columns_of<Bf16>(a, prompt, latent, b, e);
  else columns_of<F16>(a, prompt, latent, b, e);
}

const Kernels kernels{scale, latent, columns};
