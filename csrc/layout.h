// How an adapter lies in memory: one blob of bytes. vllm_pedro/ops/layout.py says what is where, and
// packs it; here is what kernels need of it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VLLM_PEDRO_DEVICE __host__ __device__
#else
#define VLLM_PEDRO_DEVICE
#endif

namespace vllm_pedro {

// Places are counted in units of so many bytes.
constexpr int64_t kUnit = 16;
constexpr int32_t kMagic = 0x50454431;
constexpr int64_t kMaxRanges = 8;
constexpr int64_t kMaxOrder = 32;

// A blob begins with these words, then has one for each layer: where its record begins, or 0.
enum BlobField { kBlobMagic = 0, kBlobLayers = 1, kBlobUnits = 2 };
constexpr int64_t kBlobWords = 8;

enum RecordField {
  kDtype = 0,
  kActivation = 1,
  kRank = 2,
  kNumeratorDegree = 3,
  kDenominatorDegree = 4,
  kPooling = 5,
  kInputNorm = 6,
  kHiddenSize = 7,
  kColumns = 8,
  kRanges = 9,
  kDownBias = 10,
  kBias = 11,
  kDown = 12,
  kUp = 13
};
constexpr int64_t kRecordWords = 16;

// Words from a record's start.
constexpr int64_t kRangesAt = kRecordWords;
constexpr int64_t kNumeratorAt = kRangesAt + 2 * kMaxRanges;
constexpr int64_t kDenominatorAt = kNumeratorAt + 36;
constexpr int64_t kWeightsAt = kDenominatorAt + kMaxOrder;

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Activation { kGelu = 0, kRelu = 1, kRational = 2 };
enum Pooling { kLast = 0, kMean = 1, kMax = 2 };

// Columns of `prefills`, [max prefills, 4] int32; the place is a blob's in the arena.
enum PrefillField { kStart = 0, kLength = 1, kRow = 2, kPlace = 3, kPrefillFields = 4 };

// One layer's generator.
struct Record {
  const unsigned char* at;  // null where the layer has none

  VLLM_PEDRO_DEVICE const int32_t* words() const { return reinterpret_cast<const int32_t*>(at); }
  VLLM_PEDRO_DEVICE int64_t operator[](RecordField field) const { return words()[field]; }
  VLLM_PEDRO_DEVICE int64_t rank() const { return at ? words()[kRank] : 0; }
  // Pairs of a column of the store and a width; none where there is no record.
  VLLM_PEDRO_DEVICE const int32_t* ranges() const { return words() + kRangesAt; }
  VLLM_PEDRO_DEVICE int64_t num_ranges() const { return at ? words()[kRanges] : 0; }
  VLLM_PEDRO_DEVICE const float* numerator() const { return floats() + kNumeratorAt; }
  VLLM_PEDRO_DEVICE const float* denominator() const { return floats() + kDenominatorAt; }
  // What lies at one of the places: kDownBias in float32, the others in the record's dtype.
  template <typename T>
  VLLM_PEDRO_DEVICE const T* part(RecordField field) const {
    return reinterpret_cast<const T*>(at + words()[field] * kUnit);
  }

 private:
  VLLM_PEDRO_DEVICE const float* floats() const { return reinterpret_cast<const float*>(at); }
};

VLLM_PEDRO_DEVICE inline Record record_of(const unsigned char* arena, int64_t place, int64_t layer) {
  const unsigned char* blob = arena + place * kUnit;
  const int64_t offset = reinterpret_cast<const int32_t*>(blob)[kBlobWords + layer];
  return Record{offset ? blob + offset * kUnit : nullptr};
}

}  // namespace vllm_pedro
