// NF4 quantisation and dequantisation over the primitives of one instruction set.
//
// Included inside the namespace of that instruction set, after its simd_*.h, which defines:
//   abs_bits_max(w, n)         largest |w| as bits of w's dtype, n a multiple of kStep
//   Encoder(thresholds)        (w, r, out): kStep weights times r to kStep / 2 bytes
//   Decoder<T>(code, a)        (packed, out): kStep / 2 bytes to kStep weights, cast(fl(code * a))
// Bound by memory: 4.5 (fp32) or 2.5 bytes (fp16, bf16) a weight, in either direction.

constexpr int64_t kStep = 32;
constexpr int64_t kBatch = 2048;  // weights whose scales are found before their codes
constexpr int kZeroByte = 0x77;   // code 7, the value 0, twice

template <class T>
int64_t count_nonfinite(const T* w, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += !is_finite(to_float(w[i]));
  return count;
}

template <class T>
float block_absmax(const T* w, int64_t count) {
  const int64_t whole = count / kStep * kStep;
  uint32_t bits = abs_bits_max(w, whole);
  if (whole < count) {
    T tail[kStep] = {};
    memcpy(tail, w + whole, (count - whole) * sizeof(T));
    const uint32_t tail_bits = abs_bits_max(tail, kStep);
    if (tail_bits > bits) bits = tail_bits;
  }
  return magnitude(bits, w);
}

template <class T>
void encode_block(const Encoder& encode, const T* w, int64_t count, float r, uint8_t* packed) {
  if (!is_finite(r)) {
    memset(packed, kZeroByte, (count + 1) / 2);
    return;
  }
  const int64_t whole = count / kStep * kStep;
  for (int64_t i = 0; i < whole; i += kStep) encode(w + i, r, packed + i / 2);
  if (whole < count) {
    T tail[kStep] = {};  // zeros are code 7, which is what the nibble after an odd count holds
    uint8_t bytes[kStep / 2];
    memcpy(tail, w + whole, (count - whole) * sizeof(T));
    encode(tail, r, bytes);
    memcpy(packed + whole / 2, bytes, (count - whole + 1) / 2);
  }
}

template <class T>
int64_t quantize_blocks(const QuantizeBlocks& args, int64_t first, int64_t last) {
  const QuantizeBlocks q = args;  // a copy, which the bytes written cannot alias
  const Encoder encode(q.thresholds);
  const T* w = static_cast<const T*>(q.w);
  int64_t nonfinite = 0;
  // scales of a batch that fits the first cache, then its codes: a block alone would wait for its
  // own maximum and division
  const int64_t batch = q.blocksize < kBatch ? kBatch / q.blocksize : 1;
  for (int64_t from = first; from < last; from += batch) {
    const int64_t to = last - from < batch ? last : from + batch;
    for (int64_t block = from; block < to; ++block) {
      const int64_t start = block * q.blocksize, left = q.numel - start;
      const int64_t count = left < q.blocksize ? left : q.blocksize;
      const float absmax = block_absmax(w + start, count);
      if (!is_finite(absmax)) nonfinite += count_nonfinite(w + start, count);
      q.absmax[block] = absmax;
    }
    for (int64_t block = from; block < to; ++block) {
      const int64_t start = block * q.blocksize, left = q.numel - start;
      const int64_t count = left < q.blocksize ? left : q.blocksize;
      encode_block(encode, w + start, count, 1.0f / q.absmax[block], q.packed + start / 2);
    }
  }
  return nonfinite;
}

// two roundings in the nested case: the product, then the sum
inline float block_scale(const DequantizeBlocks& d, int64_t block) {
  if (d.absmax_codes == nullptr) return d.absmax[block];
  return d.code2[d.absmax_codes[block]] * d.absmax2[block / kStatsGroup] + d.offset;
}

template <class T>
void dequantize_blocks(const DequantizeBlocks& args, int64_t first, int64_t last) {
  const DequantizeBlocks d = args;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * d.blocksize;
    const int64_t left = d.numel - start;
    const int64_t count = left < d.blocksize ? left : d.blocksize;
    const int64_t whole = count / kStep * kStep, rest = count - whole;
    const uint8_t* packed = d.packed + start / 2;
    T* out = static_cast<T*>(d.out) + start;
    // 16 products a block instead of one a weight: the roundings are the same
    const Decoder<T> decode(d.code, block_scale(d, block));
    for (int64_t i = 0; i < whole; i += kStep) decode(packed + i / 2, out + i);
    if (rest > 0) {
      uint8_t bytes[kStep / 2] = {};
      T tail[kStep];
      memcpy(bytes, packed + whole / 2, (rest + 1) / 2);
      decode(bytes, tail);
      memcpy(out + whole, tail, rest * sizeof(T));
    }
  }
}

// The arithmetic of bitsandbytes' CPU kernel, rounding by rounding: d = absmax - offset, times
// 1/max|d|, to the nearest of 65536 grid points, whose code is in the table.
inline void quantize_stats(const QuantizeStats& q, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) {
    const int64_t start = group * kStatsGroup;
    const int64_t left = q.blocks - start;
    const int64_t count = left < kStatsGroup ? left : kStatsGroup;
    float d[kStatsGroup] = {};
    uint32_t bits = 0;  // integers compare as their floats do, and vectorise
    for (int64_t i = 0; i < count; ++i) {
      d[i] = q.absmax[start + i] - q.offset;
      const uint32_t magnitude_bits = bits_of(d[i]) & 0x7fffffffu;
      bits = magnitude_bits > bits ? magnitude_bits : bits;
    }
    q.absmax2[group] = float_of_bits(bits);
    const float r = 1.0f / float_of_bits(bits);
    for (int64_t i = 0; i < count; ++i) {
      const float position = (d[i] * r + 1.0f) * 32767.5f + 0.5f;
      // false for NaN and for a group without a scale too
      const bool valid = is_finite(r) && position >= 0.0f && position < 65536.0f;
      q.codes[start + i] = q.lut[valid ? static_cast<int32_t>(position) : 0];
    }
  }
}
