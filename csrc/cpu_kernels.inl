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
  for (int64_t j = 0; j < width; ++j) store(x + j, load(x[j]) * load(by[j]));
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

// g(p @ W_down) of one prompt: `latent` [max_rank].
template <typename T>
void generate_latent(
    float* latent,
    float* scratch,
    const T* hidden,
    int64_t stride,
    const int32_t* prompt,
    const float* generator,
    const Layout& at) {
  const int64_t rank = static_cast<int64_t>(generator[1]);
  if (rank == 0) return;
  float* pooled = scratch;
  pool(
      pooled,
      scratch + at.hidden_size,
      hidden + prompt[kStart] * stride,
      stride,
      prompt[kLength],
      at.hidden_size,
      static_cast<int>(generator[4]),
      generator[5] != 0.0f);
  for (int64_t k = 0; k < rank; ++k) {
    const float* w = generator + at.down() + k * at.hidden_size;
    const float x = reduce(at.hidden_size, [w, pooled](int64_t j) { return w[j] * pooled[j]; });
    latent[k] = activate(
        x,
        static_cast<int>(generator[0]),
        generator + at.numerator(),
        static_cast<int64_t>(generator[2]),
        generator + at.denominator(),
        static_cast<int64_t>(generator[3]));
  }
}

// Columns [begin, end) of latent @ W_up + b_up, written into the store's row.
template <typename T>
void write_columns(
    T* __restrict row,
    const float* __restrict latent,
    const float* __restrict generator,
    const Layout& at,
    int64_t begin,
    int64_t end) {
  const int64_t rank = static_cast<int64_t>(generator[1]);
  const float* bias = generator + at.bias();
  const float* up = generator + at.up();
  for (int64_t first = begin; first < end; first += kLanes) {
    float sums[kLanes] = {};
    const int64_t count = end - first < kLanes ? end - first : kLanes;
    if (count == kLanes) {
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = 0; j < kLanes; ++j) sums[j] += latent[k] * up[k * at.width + first + j];
      for (int64_t j = 0; j < kLanes; ++j) store(row + first + j, sums[j] + bias[first + j]);
    } else {
      for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = 0; j < count; ++j) sums[j] += latent[k] * up[k * at.width + first + j];
      for (int64_t j = 0; j < count; ++j) store(row + first + j, sums[j] + bias[first + j]);
    }
  }
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
  const int32_t* fields = a.prefills + prompt * kPrefillFields;
  generate_latent(
      latent,
      scratch,
      static_cast<const T*>(a.hidden),
      a.hidden_stride,
      fields,
      a.generators + fields[kSlot] * a.at.record,
      a.at);
}

void latent(const GenerateArgs& a, Type type, int64_t prompt, float* out, float* scratch) {
  if (type == Type::f32) latent_of<float>(a, prompt, out, scratch);
  else if (type == Type::bf16) latent_of<Bf16>(a, prompt, out, scratch);
  else latent_of<F16>(a, prompt, out, scratch);
}

template <typename T>
void columns_of(const GenerateArgs& a, int64_t prompt, const float* latent, int64_t b, int64_t e) {
  const int32_t* fields = a.prefills + prompt * kPrefillFields;
  write_columns(
      static_cast<T*>(a.vectors) + fields[kRow] * a.at.width,
      latent,
      a.generators + fields[kSlot] * a.at.record,
      a.at,
      b,
      e);
}

void columns(
    const GenerateArgs& a, Type type, int64_t prompt, const float* latent, int64_t b, int64_t e) {
  if (type == Type::f32) columns_of<float>(a, prompt, latent, b, e);
  else if (type == Type::bf16) columns_of<Bf16>(a, prompt, latent, b, e);
  else columns_of<F16>(a, prompt, latent, b, e);
}

const Kernels kernels{scale, latent, columns};
