// Primitives in AVX2 with F16C. Included inside a namespace; what they must do is said in
// nf4_kernels.h and dropout_kernels.h.

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

// 8 numbers
using Vec = __m256;
constexpr int64_t kWidth = 8;
constexpr int kTileRows = 6;  // 12 sums, two registers of the right operand, one of the left

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Fp16* p) { return _mm256_cvtph_ps(load128(p)); }
inline Vec load(const Bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}

// 8 numbers to 8 halves, round to nearest even
inline __m128i narrow(__m256 x, const Fp16*) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

inline __m128i narrow(__m256 x, const Bf16*) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i upper =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
template <class T>
void store(T* p, Vec x) {
  store128(p, narrow(x, p));
}
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec square_root(Vec x) { return _mm256_sqrt_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

template <class T>
Vec rounded(Vec x) {
  T narrowed[8];
  store(narrowed, x);
  return load(narrowed);
}

using Words = __m256i;

inline Vec as_floats(Words x) { return _mm256_castsi256_ps(x); }

// 16 bytes of each row are a 4 x 4 matrix of words in each 128-bit lane, if rows 4 apart are loaded
// together; transposing those is all there is to do
inline void load_words(const uint8_t* const* rows, int64_t at, Words (&w)[4]) {
  __m256i x[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_set_m128i(load128(rows[i + 4] + at), load128(rows[i] + at));
  }
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpacklo_epi32(x[2], x[3]);
  const __m256i c = _mm256_unpackhi_epi32(x[0], x[1]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  w[0] = _mm256_unpacklo_epi64(a, b);
  w[1] = _mm256_unpackhi_epi64(a, b);
  w[2] = _mm256_unpacklo_epi64(c, d);
  w[3] = _mm256_unpackhi_epi64(c, d);
}

// Values of the codes in the lower four bits of each lane: a lookup reads the lower three bits of
// an index, the blend the sign, so bit 3 goes there.
inline Vec choose(Vec negative, Vec positive, Words codes) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(negative, codes),
                          _mm256_permutevar8x32_ps(positive, codes),
                          _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

struct Lookup {
  Vec negative, positive;  // codes 0 to 7, 8 to 15

  explicit Lookup(const float* code) : negative(load(code)), positive(load(code + 8)) {}

  Vec operator()(Words words, int shift) const {
    return choose(negative, positive, _mm256_srl_epi32(words, _mm_cvtsi32_si128(shift)));
  }
};

inline uint32_t abs_bits_max(const float* w, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    most = _mm256_max_epi32(most, _mm256_and_si256(load256(w + i), magnitude));
  }
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
}

template <class T>
uint32_t abs_bits_max(const T* w, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 16) {
    most = _mm256_max_epi16(most, _mm256_and_si256(load256(w + i), magnitude));
  }
  const __m128i x = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  // there is a horizontal minimum only
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1)));
  return 0xffffu & ~static_cast<uint32_t>(_mm_cvtsi128_si32(least));
}

struct Encoder {
  __m256 eighth, quarter, pair, single;  // thresholds of the four steps of a binary search

  explicit Encoder(const float* t) {
    eighth = _mm256_set1_ps(t[7]);
    quarter = _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0);
    pair = _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0);
    single = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]);
  }

  // one more bit of the code: 2 c + (x > t)
  static __m256i append(__m256i c, __m256 x, __m256 t) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, t, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(c, c), above);
  }

  __m256i codes(__m256 x) const {
    __m256i c = append(_mm256_setzero_si256(), x, eighth);
    c = append(c, x, _mm256_permutevar8x32_ps(quarter, c));
    c = append(c, x, _mm256_permutevar8x32_ps(pair, c));
    return append(c, x, _mm256_permutevar8x32_ps(single, c));
  }

  // 16 weights to 8 bytes, one in each 32-bit lane
  __m256i bytes(__m256 even, __m256 odd, __m256 r) const {
    const __m256i high = _mm256_slli_epi32(codes(_mm256_mul_ps(even, r)), 4);
    return _mm256_or_si256(high, codes(_mm256_mul_ps(odd, r)));
  }

  template <class T>
  __m256i bytes(const T* w, __m256 r) const {
    const __m256 a = load(w), b = load(w + 8);
    const __m256i mixed = bytes(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd), r);
    return _mm256_permute4x64_epi64(mixed, 0xd8);
  }

  __m256i bytes(const Bf16* w, __m256 r) const {
    const __m256i x = load256(w);
    const __m256i odd = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return bytes(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(odd), r);
  }

  template <class T>
  void operator()(const T* w, float scalar_r, uint8_t* out) const {
    const __m256 r = _mm256_set1_ps(scalar_r);
    const __m256i words = _mm256_packus_epi32(bytes(w, r), bytes(w + 16, r));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    store128(out, _mm_packus_epi16(_mm256_castsi256_si128(ordered),
                                   _mm256_extracti128_si256(ordered, 1)));
  }
};

// 16-bit values: their lower and upper bytes are two tables of 16
template <class T>
struct Decoder {
  __m256i lower, upper;

  Decoder(const float* code, float a, const T* = nullptr) {
    const __m256 scale = _mm256_set1_ps(a);
    const T* tag = nullptr;
    const __m128i x = narrow(_mm256_mul_ps(_mm256_loadu_ps(code), scale), tag);
    const __m128i y = narrow(_mm256_mul_ps(_mm256_loadu_ps(code + 8), scale), tag);
    const __m128i mask = _mm_set1_epi16(0xff);
    lower = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(x, mask), _mm_and_si128(y, mask)));
    upper =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(x, 8), _mm_srli_epi16(y, 8)));
  }

  void operator()(const uint8_t* packed, T* out) const {
    const __m256i x = _mm256_cvtepu8_epi16(load128(packed));
    const __m256i nibbles =
        _mm256_or_si256(_mm256_srli_epi16(x, 4),
                        _mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16(0xf00)));
    const __m256i low = _mm256_shuffle_epi8(lower, nibbles);
    const __m256i high = _mm256_shuffle_epi8(upper, nibbles);
    const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    store256(out, _mm256_permute2x128_si256(a, b, 0x20));
    store256(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
  }
};

template <>
struct Decoder<float> {
  __m256 negative, positive;  // codes 0 to 7, 8 to 15

  Decoder(const float* code, float a) : Decoder(code, a, code) {}
  // values that were rounded to T
  template <class T>
  Decoder(const float* code, float a, const T*) {
    negative = rounded<T>(_mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(a)));
    positive = rounded<T>(_mm256_mul_ps(_mm256_loadu_ps(code + 8), _mm256_set1_ps(a)));
  }

  void operator()(const uint8_t* packed, float* out) const {
    for (int i = 0; i < 16; i += 4) {
      int32_t four;
      memcpy(&four, packed + i, sizeof(four));
      const __m256i x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      const __m256i index = _mm256_or_si256(_mm256_srli_epi64(x, 4), _mm256_slli_epi64(x, 32));
      _mm256_storeu_ps(out + 2 * i, choose(negative, positive, index));
    }
  }
};

// 64 bits wide; Philox words in the lower halves, rubbish that is never read in the upper
constexpr int kLanes = 4;
using Lanes = __m256i;
using Halves = __m256i;

inline Lanes broadcast(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline void multiply(Lanes a, Lanes b, Lanes* high, Lanes* low) {
  *low = _mm256_mul_epu32(a, b);
  *high = _mm256_srli_epi64(*low, 32);
}
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Lanes lane_counters() { return _mm256_setr_epi64x(0, 2, 1, 3); }

inline void halves(const Lanes (&w)[4], Halves* lower, Halves* upper) {
  const __m256i first = _mm256_blend_epi32(w[0], _mm256_slli_epi64(w[1], 32), 0xaa);
  const __m256i second = _mm256_blend_epi32(w[2], _mm256_slli_epi64(w[3], 32), 0xaa);
  *lower = _mm256_unpacklo_epi64(first, second);
  *upper = _mm256_unpackhi_epi64(first, second);
}

// 16 lanes of ones where kept
inline __m256i kept(Halves numbers, uint32_t threshold) {
  const __m256i t = _mm256_set1_epi16(static_cast<short>(threshold));
  return _mm256_cmpeq_epi16(_mm256_max_epu16(numbers, t), numbers);
}

template <class T>
void drop(Halves numbers, uint32_t threshold, float scale, const T* x, T* out) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m128i a = narrow(_mm256_mul_ps(load(x), s), x);
  const __m128i b = narrow(_mm256_mul_ps(load(x + 8), s), x);
  store256(out, _mm256_and_si256(_mm256_set_m128i(b, a), kept(numbers, threshold)));
}

inline void drop(Halves numbers, uint32_t threshold, float scale, const float* x, float* out) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256i keep = kept(numbers, threshold);
  const __m256i a = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(keep));
  const __m256i b = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(keep, 1));
  _mm256_storeu_ps(out,
                   _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x), s), _mm256_castsi256_ps(a)));
  _mm256_storeu_ps(out + 8,
                   _mm256_and_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 8), s), _mm256_castsi256_ps(b)));
}

template <bool kSigned>
void decode_block(const float* values, const uint8_t* in, float scale, float* out) {
  for (int64_t i = 0; i < kMomentBlock; ++i) out[i] = values[in[i]] * scale;
}

inline Vec at_least(Vec x, Vec least) {
  return _mm256_max_ps(_mm256_andnot_ps(splat(-0.0f), x), least);
}
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Words as_words(Vec x) { return _mm256_castps_si256(x); }
inline Words integers(Vec x) { return _mm256_cvtps_epi32(x); }
inline Words shifted(Words x, int right) { return _mm256_srli_epi32(x, right); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words differing(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words splat_words(int x) { return _mm256_set1_epi32(x); }
inline Words least(Words a, Words b) { return _mm256_min_epu32(a, b); }
inline bool any_zero(Words x) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(x, _mm256_setzero_si256())) != 0;
}
inline Words add_if_above(Words n, Vec a, Vec b) {
  return _mm256_sub_epi32(n, as_words(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline Words if_positive(Words n, Vec x) {
  return both(n, as_words(_mm256_cmp_ps(x, splat(0), _CMP_GT_OQ)));
}
inline Words steps_from(int zero, Words n, Vec x) {
  // of zero no steps are left, which is right
  return _mm256_add_epi32(splat_words(zero), _mm256_sign_epi32(n, as_words(x)));
}
inline void store_bytes(uint8_t* out, const Words (&w)[4]) {
  // each 128-bit lane has four bytes of each
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packs_epi32(w[0], w[1]), _mm256_packs_epi32(w[2], w[3]));
  store256(out, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
