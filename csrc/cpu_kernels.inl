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

// exp(x) to within 2 units in the last place, in operations that vectorise. Cephes' polynomial.
inline float exp_(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = __builtin_nearbyintf(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

struct Silu {
  static inline float apply(float x) { return x / (1.0f + exp_(-x)); }
};
struct GeluTanh {
  // tanh(y) = 1 - 2 / (1 + exp(2 y)); gelu = x * (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)).
  static inline float apply(float x) {
    const float y = 0.79788456080286536f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_(-2.0f * y));
  }
};
struct GeluErf {
  // The normal distribution by erfc(z) = t (a1 + ... + a5 t^4) exp(-z^2) for z >= 0, Abramowitz and
  // Stegun 7.1.26, within 1.5e-7: std::erf does not vectorise, and takes ten times as long.
  static inline float apply(float x) {
    const float z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float above = 0.5f * t * p * exp_(-z * z);
    return x * (x < 0.0f ? above : 1.0f - above);
  }
};

template <typename Act, typename T, bool kGateScaled, bool kUpScaled>
void act_row(
    T* __restrict out,
    const T* __restrict gate,
    const T* __restrict up,
    const T* __restrict by_gate,
    const T* __restrict by_up,
    int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    float g = load(gate[j]);
    float u = load(up[j]);
    if (kGateScaled) g *= load(by_gate[j]);
    if (kUpScaled) u *= load(by_up[j]);
    store(out + j, Act::apply(g) * u);
  }
}

template <typename Act, typename T>
void act_row_any(
    T* out, const T* gate, const T* up, const T* by_gate, const T* by_up, int64_t width) {
  if (by_gate && by_up) act_row<Act, T, true, true>(out, gate, up, by_gate, by_up, width);
  else if (by_gate) act_row<Act, T, true, false>(out, gate, up, by_gate, by_up, width);
  else if (by_up) act_row<Act, T, false, true>(out, gate, up, by_gate, by_up, width);
  else act_row<Act, T, false, false>(out, gate, up, by_gate, by_up, width);
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
    const int64_t slot = a.token_slots[t];
    if (slot == 0) continue;
    for (int64_t i = 0; i + 2 < a.num_ranges; i += 3)
      scale_row(
          x + t * a.x_stride + a.ranges[i],
          vectors + slot * a.vectors_stride + a.ranges[i + 1],
          a.ranges[i + 2]);
  }
}

template <typename Act, typename T>
void act_tokens(const ActArgs& a, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(a.out);
  const T* x = static_cast<const T*>(a.x);
  const T* vectors = static_cast<const T*>(a.vectors);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = a.token_slots ? a.token_slots[t] : 0;
    const T* by = vectors + slot * a.vectors_stride;
    act_row_any<Act, T>(
        out + t * a.width,
        x + t * a.x_stride,
        x + t * a.x_stride + a.width,
        slot && a.gate_column >= 0 ? by + a.gate_column : nullptr,
        slot && a.up_column >= 0 ? by + a.up_column : nullptr,
        a.width);
  }
}

template <typename Act>
void act_any(const ActArgs& a, Type type, int64_t begin, int64_t end) {
  if (type == Type::f32) act_tokens<Act, float>(a, begin, end);
  else if (type == Type::bf16) act_tokens<Act, Bf16>(a, begin, end);
  else act_tokens<Act, F16>(a, begin, end);
}

void scale(const ScaleArgs& a, Type type, int64_t begin, int64_t end) {
  if (type == Type::f32) scale_tokens<float>(a, begin, end);
  else if (type == Type::bf16) scale_tokens<Bf16>(a, begin, end);
  else scale_tokens<F16>(a, begin, end);
}

void act(const ActArgs& a, Type type, Gate gate, int64_t begin, int64_t end) {
  if (gate == Gate::silu) act_any<Silu>(a, type, begin, end);
  else if (gate == Gate::gelu) act_any<GeluErf>(a, type, begin, end);
  else act_any<GeluTanh>(a, type, begin, end);
}

template <typename T>
void latent_of(const GenerateArgs& a, int64_t prompt, float* latent, float* scratch) {
  const int32_t* fields = a.prompts + prompt * kPromptFields;
  generate_latent(
      latent,
      scratch,
      static_cast<const T*>(a.hidden),
      a.hidden_stride,
      fields,
      a.generators + fields[kSlot] * a.at.row,
      a.at);
}

void latent(const GenerateArgs& a, Type type, int64_t prompt, float* out, float* scratch) {
  if (type == Type::f32) latent_of<float>(a, prompt, out, scratch);
  else if (type == Type::bf16) latent_of<Bf16>(a, prompt, out, scratch);
  else latent_of<F16>(a, prompt, out, scratch);
}

template <typename T>
void columns_of(const GenerateArgs& a, int64_t prompt, const float* latent, int64_t b, int64_t e) {
  const int32_t* fields = a.prompts + prompt * kPromptFields;
  write_columns(
      static_cast<T*>(a.vectors) + fields[kRow] * a.at.width,
      latent,
      a.generators + fields[kSlot] * a.at.row,
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

const Kernels kernels{scale, act, latent, columns};
