// Primitives in AVX-512 (F, BW, VL, DQ). Included inside a namespace; what they must do is said in
// nf4_kernels.h and dropout_kernels.h.

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// 16 numbers rounded to bf16, to nearest even, in the upper half of each lane; rubbish below
inline __m512i round_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc00000));
}

// 16 numbers
using Vec = __m512;
constexpr int64_t kWidth = 16;
constexpr int kTileRows = 14;  // 28 sums, two registers of the right operand, one of the left

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Fp16* p) { return _mm512_cvtph_ps(load256(p)); }
inline Vec load(const Bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Fp16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Bf16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16)));
}
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

template <class T>
Vec rounded(Vec x);
template <>
inline Vec rounded<float>(Vec x) {
  return x;
}
template <>
inline Vec rounded<Fp16>(Vec x) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
template <>
inline Vec rounded<Bf16>(Vec x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(round_bf16(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

using Words = __m512i;

inline Vec as_floats(Words x) { return _mm512_castsi512_ps(x); }

// 16 bytes of each row are a 4 x 4 matrix of words in each 128-bit lane, if rows 4 apart are loaded
// together; transposing those is all there is to do
inline void load_words(const uint8_t* const* rows, int64_t at, Words (&w)[4]) {
  __m512i x[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_castsi128_si512(load128(rows[i] + at));
    x[i] = _mm512_inserti32x4(x[i], load128(rows[i + 4] + at), 1);
    x[i] = _mm512_inserti32x4(x[i], load128(rows[i + 8] + at), 2);
    x[i] = _mm512_inserti32x4(x[i], load128(rows[i + 12] + at), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  w[0] = _mm512_unpacklo_epi64(a, b);
  w[1] = _mm512_unpackhi_epi64(a, b);
  w[2] = _mm512_unpacklo_epi64(c, d);
  w[3] = _mm512_unpackhi_epi64(c, d);
}

struct Lookup {
  __m512 values;

  explicit Lookup(const float* code) : values(_mm512_loadu_ps(code)) {}

  // a lookup reads the lower four bits of an index
  Vec operator()(Words words, int shift) const {
    return _mm512_permutexvar_ps(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift)), values);
  }
};

inline uint32_t abs_bits_max(const float* w, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    most = _mm512_max_epi32(most, _mm512_and_si512(load512(w + i), magnitude));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
}

template <class T>
uint32_t abs_bits_max(const T* w, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 32) {
    most = _mm512_max_epi16(most, _mm512_and_si512(load512(w + i), magnitude));
  }
  const __m256i half =
      _mm256_max_epi16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i x = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // there is a horizontal minimum only
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1)));
  return 0xffffu & ~static_cast<uint32_t>(_mm_cvtsi128_si32(least));
}

struct Pairs {
  __m512 even, odd;
};

inline Pairs split(__m512 a, __m512 b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
}

// 32 numbers, those of even and of odd index
inline Pairs load_pairs(const float* w) {
  return split(_mm512_loadu_ps(w), _mm512_loadu_ps(w + 16));
}
inline Pairs load_pairs(const Fp16* w) {
  return split(_mm512_cvtph_ps(load256(w)), _mm512_cvtph_ps(load256(w + 16)));
}
inline Pairs load_pairs(const Bf16* w) {
  const __m512i x = load512(w);
  const __m512i odd = _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(odd)};
}

struct Encoder {
  __m512 eighth, quarter, pair, single;  // thresholds of the four steps of a binary search

  // at code c so far, a step of size n compares with threshold c + n - 1
  explicit Encoder(const float* t) {
    const __m512 all = _mm512_maskz_loadu_ps(0x7fff, t);
    const __m512i c = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    eighth = _mm512_set1_ps(t[7]);
    quarter = _mm512_permutexvar_ps(_mm512_add_epi32(c, _mm512_set1_epi32(3)), all);
    pair = _mm512_permutexvar_ps(_mm512_add_epi32(c, _mm512_set1_epi32(1)), all);
    single = all;
  }

  static __m512i step(__m512i c, __m512 x, __m512 t, int size) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, t, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(c, above, c, _mm512_set1_epi32(size));
  }

  __m512i codes(__m512 x) const {
    __m512i c = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, eighth, _CMP_GT_OQ), 8);
    c = step(c, x, _mm512_permutexvar_ps(c, quarter), 4);
    c = step(c, x, _mm512_permutexvar_ps(c, pair), 2);
    return step(c, x, _mm512_permutexvar_ps(c, single), 1);
  }

  template <class T>
  void operator()(const T* w, float scalar_r, uint8_t* out) const {
    const __m512 r = _mm512_set1_ps(scalar_r);
    const Pairs x = load_pairs(w);
    const __m512i high = _mm512_slli_epi32(codes(_mm512_mul_ps(x.even, r)), 4);
    const __m512i bytes = _mm512_or_si512(high, codes(_mm512_mul_ps(x.odd, r)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(bytes));
  }
};

inline __m512 scaled(const float* code, float a) {
  return _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(a));
}

// 16-bit values in the lower half of each lane
inline __m512i narrow(__m512 x, const Fp16*) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline __m512i narrow(__m512 x, const Bf16*) { return _mm512_srli_epi32(round_bf16(x), 16); }

template <class T>
struct Decoder {
  __m512i even, odd;  // the table for the lower and for the upper half of a lane

  Decoder(const float* code, float a, const T* = nullptr) {
    even = narrow(scaled(code, a), static_cast<const T*>(nullptr));
    odd = _mm512_slli_epi32(even, 16);
  }

  // a lookup reads the lower four bits of an index
  void operator()(const uint8_t* packed, T* out) const {
    const __m512i low = _mm512_cvtepu8_epi32(load128(packed));
    const __m512i high = _mm512_srli_epi32(low, 4);
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_permutexvar_epi32(high, even),
                                             _mm512_permutexvar_epi32(low, odd)));
  }
};

template <>
struct Decoder<float> {
  __m512 values;

  Decoder(const float* code, float a) : values(scaled(code, a)) {}
  // values that were rounded to T
  template <class T>
  Decoder(const float* code, float a, const T*) : values(rounded<T>(scaled(code, a))) {}

  void operator()(const uint8_t* packed, float* out) const {
    for (int i = 0; i < 16; i += 8) {
      const __m512i x =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(x, 4), _mm512_slli_epi64(x, 32));
      _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(index, values));
    }
  }
};

// 64 bits wide; Philox words in the lower halves, rubbish that is never read in the upper
constexpr int kLanes = 8;
using Lanes = __m512i;
using Halves = __m512i;

inline Lanes broadcast(uint32_t x) { return _mm512_set1_epi64(x); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline void multiply(Lanes a, Lanes b, Lanes* high, Lanes* low) {
  *low = _mm512_mul_epu32(a, b);
  *high = _mm512_srli_epi64(*low, 32);
}
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Lanes lane_counters() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

inline void halves(const Lanes (&w)[4], Halves* lower, Halves* upper) {
  const __m512i first = _mm512_mask_mov_epi32(w[0], 0xaaaa, _mm512_slli_epi64(w[1], 32));
  const __m512i second = _mm512_mask_mov_epi32(w[2], 0xaaaa, _mm512_slli_epi64(w[3], 32));
  *lower = _mm512_unpacklo_epi64(first, second);
  *upper = _mm512_unpackhi_epi64(first, second);
}

inline __mmask32 kept(Halves numbers, uint32_t threshold) {
  return _mm512_cmpge_epu16_mask(numbers, _mm512_set1_epi16(static_cast<short>(threshold)));
}

inline void drop(Halves numbers, uint32_t threshold, float scale, const float* x, float* out) {
  const __m512 s = _mm512_set1_ps(scale);
  const __mmask32 keep = kept(numbers, threshold);
  const __mmask16 low = static_cast<__mmask16>(keep), high = static_cast<__mmask16>(keep >> 16);
  _mm512_storeu_ps(out, _mm512_maskz_mul_ps(low, _mm512_loadu_ps(x), s));
  _mm512_storeu_ps(out + 16, _mm512_maskz_mul_ps(high, _mm512_loadu_ps(x + 16), s));
}

inline void drop(Halves numbers, uint32_t threshold, float scale, const Fp16* x, Fp16* out) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 a = _mm512_mul_ps(_mm512_cvtph_ps(load256(x)), s);
  const __m512 b = _mm512_mul_ps(_mm512_cvtph_ps(load256(x + 16)), s);
  const __m512i y =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)),
                         _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT), 1);
  _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(kept(numbers, threshold), y));
}

inline void drop(Halves numbers, uint32_t threshold, float scale, const Bf16* x, Bf16* out) {
  const __m512 s = _mm512_set1_ps(scale);
  const Pairs pairs = load_pairs(x);
  const __m512i even = _mm512_srli_epi32(round_bf16(_mm512_mul_ps(pairs.even, s)), 16);
  const __m512i odd = round_bf16(_mm512_mul_ps(pairs.odd, s));
  const __m512i y = _mm512_mask_mov_epi16(even, 0xaaaaaaaa, odd);
  _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(kept(numbers, threshold), y));
}

// A table in registers. Lookups in two of them read the lower five bits of an index, blends the
// rest.
struct Table128 {
  __m512 parts[8];

  explicit Table128(const float* values) {
    for (int i = 0; i < 8; ++i) parts[i] = load(values + 16 * i);
  }

  Vec operator()(__m512i i) const {
    const __mmask16 bit5 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    const Vec low = _mm512_mask_mov_ps(of32(i, 0), bit5, of32(i, 2));
    const Vec high = _mm512_mask_mov_ps(of32(i, 4), bit5, of32(i, 6));
    return _mm512_mask_mov_ps(low, bit6, high);
  }

 private:
  Vec of32(__m512i i, int at) const { return _mm512_permutex2var_ps(parts[at], i, parts[at + 1]); }
};

template <bool kSigned>
struct CodeValues;

// the values below zero are those above it, and one is beyond the others
template <>
struct CodeValues<true> {
  Table128 positive;
  Vec one;

  explicit CodeValues(const float* values) : positive(values + 127), one(splat(values[255])) {}

  Vec operator()(__m512i codes) const {
    const __m512i from_zero = _mm512_sub_epi32(codes, _mm512_set1_epi32(127));
    const __m512i size = _mm512_abs_epi32(from_zero);
    const Vec value = _mm512_mask_mov_ps(
        positive(size), _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(128)), one);
    const Vec sign = splat(-0.0f);
    return _mm512_or_ps(value, _mm512_and_ps(_mm512_castsi512_ps(from_zero), sign));
  }
};

template <>
struct CodeValues<false> {
  Table128 low, high;

  explicit CodeValues(const float* values) : low(values), high(values + 128) {}

  Vec operator()(__m512i codes) const {
    const __mmask16 bit7 = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(128));
    return _mm512_mask_mov_ps(low(codes), bit7, high(codes));
  }
};

template <bool kSigned>
void decode_block(const float* code_values, const uint8_t* in, float scale, float* out) {
  const CodeValues<kSigned> values(code_values);
  for (int64_t i = 0; i < kMomentBlock; i += kWidth) {
    store(out + i, multiply(values(_mm512_cvtepu8_epi32(load128(in + i))), splat(scale)));
  }
}

inline Vec at_least(Vec x, Vec least) {
  return _mm512_max_ps(_mm512_andnot_ps(splat(-0.0f), x), least);
}
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Words as_words(Vec x) { return _mm512_castps_si512(x); }
inline Words integers(Vec x) { return _mm512_cvtps_epi32(x); }
inline Words shifted(Words x, int right) { return _mm512_srli_epi32(x, right); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words differing(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words splat_words(int x) { return _mm512_set1_epi32(x); }
inline Words least(Words a, Words b) { return _mm512_min_epu32(a, b); }
inline bool any_zero(Words x) { return _mm512_testn_epi32_mask(x, x) != 0; }
inline Words add_if_above(Words n, Vec a, Vec b) {
  return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), n, splat_words(1));
}
inline Words if_positive(Words n, Vec x) {
  return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, splat(0), _CMP_GT_OQ), n);
}
inline Words steps_from(int zero, Words n, Vec x) {
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  const Words z = splat_words(zero);
  return _mm512_mask_sub_epi32(_mm512_add_epi32(z, n), negative, z, n);
}
inline void store_bytes(uint8_t* out, const Words (&w)[4]) {
  // each 128-bit lane has four bytes of each
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packs_epi32(w[0], w[1]), _mm512_packs_epi32(w[2], w[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, bytes));
}
