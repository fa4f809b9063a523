// Primitives in NEON of AArch64. Included inside a namespace; what they must do is said in
// nf4_kernels.h, dropout_kernels.h, tile_kernels.h and panel_kernels.h.

// 4 numbers
using Vec = float32x4_t;
constexpr int64_t kWidth = 4;
constexpr int kTileRows = 8;  // 16 sums, two registers of the right operand, one of the left

inline Vec splat(float x) { return vdupq_n_f32(x); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec subtract(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec multiply(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec divide(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec square_root(Vec x) { return vsqrtq_f32(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }

inline Vec wide(uint16x4_t x, const Fp16*) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline Vec wide(uint16x4_t x, const Bf16*) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(x), 16));
}

// 4 numbers to 4 halves, round to nearest even
inline uint16x4_t narrow(Vec x, const Fp16*) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
inline uint16x4_t narrow(Vec x, const Bf16*) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  // a NaN is not equal to itself
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

inline Vec load(const float* p) { return vld1q_f32(p); }
template <class T>
Vec load(const T* p) {
  return wide(vld1_u16(&p->bits), p);
}
inline void store(float* p, Vec x) { vst1q_f32(p, x); }
template <class T>
void store(T* p, Vec x) {
  vst1_u16(&p->bits, narrow(x, p));
}

template <class T>
Vec rounded(Vec x) {
  const T* tag = nullptr;
  return wide(narrow(x, tag), tag);
}
template <>
inline Vec rounded<float>(Vec x) {
  return x;
}

using Words = uint32x4_t;

inline Vec as_floats(Words x) { return vreinterpretq_f32_u32(x); }

// word i of x[j] to word j of w[i]
inline void transpose(const Words (&x)[4], Words (&w)[4]) {
  const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1]));
  const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1]));
  const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3]));
  const uint64x2_t d = vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]));
  w[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
  w[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
  w[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
  w[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

inline void load_words(const uint8_t* const* rows, int64_t at, Words (&w)[4]) {
  Words x[4];
  for (int i = 0; i < 4; ++i) x[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + at));
  transpose(x, w);
}

// Where the bytes of numbers lie in a table of them: number i is bytes 4 i to 4 i + 3.
inline uint8x16_t places(uint32x4_t i) {
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), i, vdupq_n_u32(0x04040404)));
}

struct Lookup {
  uint8x16x4_t table;

  explicit Lookup(const float* code) {
    for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(load(code + 4 * i));
  }

  Vec operator()(Words words, int shift) const {
    const Words codes = vandq_u32(vshlq_u32(words, vdupq_n_s32(-shift)), vdupq_n_u32(15));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, places(codes)));
  }
};

inline uint32_t abs_bits_max(const float* w, int64_t n) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int64_t i = 0; i < n; i += 4) {
    const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(w + i));
    most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
  }
  return vmaxvq_u32(most);
}

template <class T>
uint32_t abs_bits_max(const T* w, int64_t n) {
  uint16x8_t most = vdupq_n_u16(0);
  for (int64_t i = 0; i < n; i += 8) {
    most = vmaxq_u16(most, vandq_u16(vld1q_u16(&w[i].bits), vdupq_n_u16(0x7fff)));
  }
  return vmaxvq_u16(most);
}

struct Encoder {
  // thresholds of the four steps of a binary search, tables of 1, 2, 4 and 8
  Vec eighth;
  uint8x16_t quarter, pair;
  uint8x16x2_t single;

  explicit Encoder(const float* t) {
    const float quarters[4] = {t[3], t[11]}, pairs[4] = {t[1], t[5], t[9], t[13]};
    eighth = splat(t[7]);
    quarter = vreinterpretq_u8_f32(load(quarters));
    pair = vreinterpretq_u8_f32(load(pairs));
    // t[0], t[2] ... t[6] and t[8], t[10] ... t[14]
    single.val[0] = vreinterpretq_u8_f32(vld2q_f32(t).val[0]);
    single.val[1] = vreinterpretq_u8_f32(vld2q_f32(t + 7).val[1]);
  }

  // one more bit of the code: 2 c + (x > t)
  static uint32x4_t append(uint32x4_t c, Vec x, Vec t) {
    return vsubq_u32(vaddq_u32(c, c), vcgtq_f32(x, t));
  }

  uint32x4_t codes(Vec x) const {
    uint32x4_t c = append(vdupq_n_u32(0), x, eighth);
    c = append(c, x, vreinterpretq_f32_u8(vqtbl1q_u8(quarter, places(c))));
    c = append(c, x, vreinterpretq_f32_u8(vqtbl1q_u8(pair, places(c))));
    return append(c, x, vreinterpretq_f32_u8(vqtbl2q_u8(single, places(c))));
  }

  // 8 weights to 4 bytes, one in each lane
  template <class T>
  uint16x4_t bytes(const T* w, Vec r) const {
    const Vec a = load(w), b = load(w + 4);
    const uint32x4_t high = codes(multiply(vuzp1q_f32(a, b), r));
    const uint32x4_t low = codes(multiply(vuzp2q_f32(a, b), r));
    return vmovn_u32(vorrq_u32(vshlq_n_u32(high, 4), low));
  }

  template <class T>
  void operator()(const T* w, float scalar_r, uint8_t* out) const {
    const Vec r = splat(scalar_r);
    for (int i = 0; i < 16; i += 8) {
      const T* from = w + 2 * i;
      vst1_u8(out + i, vmovn_u16(vcombine_u16(bytes(from, r), bytes(from + 8, r))));
    }
  }
};

// 16-bit values: their lower and upper bytes are two tables of 16
template <class T>
struct Decoder {
  uint8x16_t lower, upper;

  Decoder(const float* code, float a) {
    const T* tag = nullptr;
    const Vec scale = splat(a);
    uint8x16_t values[2];
    for (int i = 0; i < 2; ++i) {
      const Vec x = multiply(load(code + 8 * i), scale),
                y = multiply(load(code + 8 * i + 4), scale);
      values[i] = vreinterpretq_u8_u16(vcombine_u16(narrow(x, tag), narrow(y, tag)));
    }
    lower = vuzp1q_u8(values[0], values[1]);
    upper = vuzp2q_u8(values[0], values[1]);
  }

  void operator()(const uint8_t* packed, T* out) const {
    const uint8x16_t x = vld1q_u8(packed);
    const uint8x16_t high = vshrq_n_u8(x, 4), low = vandq_u8(x, vdupq_n_u8(15));
    // high nibble first
    const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    for (int i = 0; i < 2; ++i) {
      const uint8x16x2_t y = {{vqtbl1q_u8(lower, codes[i]), vqtbl1q_u8(upper, codes[i])}};
      vst2q_u8(bytes + 32 * i, y);
    }
  }
};

template <>
struct Decoder<float> {
  uint8x16x4_t planes;  // byte i of all 16 values

  Decoder(const float* code, float a) : Decoder(code, a, static_cast<const float*>(nullptr)) {}
  // values that were rounded to T
  template <class T>
  Decoder(const float* code, float a, const T*) {
    float values[16];
    for (int i = 0; i < 16; i += 4) {
      store(values + i, rounded<T>(multiply(load(code + i), splat(a))));
    }
    planes = vld4q_u8(reinterpret_cast<const uint8_t*>(values));
  }

  void operator()(const uint8_t* packed, float* out) const {
    const uint8x16_t x = vld1q_u8(packed);
    const uint8x16_t high = vshrq_n_u8(x, 4), low = vandq_u8(x, vdupq_n_u8(15));
    const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    for (int i = 0; i < 2; ++i) {
      uint8x16x4_t y;
      for (int j = 0; j < 4; ++j) y.val[j] = vqtbl1q_u8(planes.val[j], codes[i]);
      vst4q_u8(bytes + 64 * i, y);
    }
  }
};

constexpr int kLanes = 4;
using Lanes = uint32x4_t;
using Halves = uint16x8x2_t;

inline Lanes broadcast(uint32_t x) { return vdupq_n_u32(x); }
inline Lanes add(Lanes a, Lanes b) { return vaddq_u32(a, b); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return veorq_u32(veorq_u32(a, b), c); }
inline void multiply(Lanes a, Lanes b, Lanes* high, Lanes* low) {
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
  const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a, b));
  *low = vuzp1q_u32(first, second);
  *high = vuzp2q_u32(first, second);
}

inline Lanes lane_counters() {
  const uint32_t counters[] = {0, 1, 2, 3};
  return vld1q_u32(counters);
}

// the four words of a lane are neighbours
inline void halves(const Lanes (&w)[4], Halves* lower, Halves* upper) {
  Lanes lanes[4];
  transpose(w, lanes);
  for (int i = 0; i < 2; ++i) {
    lower->val[i] = vreinterpretq_u16_u32(lanes[i]);
    upper->val[i] = vreinterpretq_u16_u32(lanes[i + 2]);
  }
}

// 4 numbers times s, or zeros
inline void drop4(uint16x4_t keep, Vec s, const float* x, float* out) {
  const uint32x4_t mask = vreinterpretq_u32_s32(vmovl_s16(vreinterpret_s16_u16(keep)));
  store(out, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(multiply(load(x), s)), mask)));
}
template <class T>
void drop4(uint16x4_t keep, Vec s, const T* x, T* out) {
  vst1_u16(&out->bits, vand_u16(narrow(multiply(load(x), s), x), keep));
}

template <class T>
void drop(Halves numbers, uint32_t threshold, float scale, const T* x, T* out) {
  const Vec s = splat(scale);
  const uint16x8_t least = vdupq_n_u16(static_cast<uint16_t>(threshold));
  for (int i = 0; i < 2; ++i) {
    const uint16x8_t keep = vcgeq_u16(numbers.val[i], least);
    drop4(vget_low_u16(keep), s, x + 8 * i, out + 8 * i);
    drop4(vget_high_u16(keep), s, x + 8 * i + 4, out + 8 * i + 4);
  }
}

template <bool kSigned>
void decode_block(const float* values, const uint8_t* in, float scale, float* out) {
  for (int64_t i = 0; i < kMomentBlock; ++i) out[i] = values[in[i]] * scale;
}

inline Vec at_least(Vec x, Vec least) { return vmaxq_f32(vabsq_f32(x), least); }
inline Vec smaller(Vec a, Vec b) { return vminq_f32(a, b); }
inline Words as_words(Vec x) { return vreinterpretq_u32_f32(x); }
inline Words integers(Vec x) { return vcvtnq_u32_f32(x); }
inline Words shifted(Words x, int right) { return vshlq_u32(x, vdupq_n_s32(-right)); }
inline Words both(Words a, Words b) { return vandq_u32(a, b); }
inline Words differing(Words a, Words b) { return veorq_u32(a, b); }
inline Words splat_words(int x) { return vdupq_n_u32(static_cast<uint32_t>(x)); }
inline Words least(Words a, Words b) { return vminq_u32(a, b); }
inline bool any_zero(Words x) { return vminvq_u32(x) == 0; }
inline Words add_if_above(Words n, Vec a, Vec b) { return vsubq_u32(n, vcgtq_f32(a, b)); }
inline Words if_positive(Words n, Vec x) { return vandq_u32(n, vcgtzq_f32(x)); }
inline Words steps_from(int zero, Words n, Vec x) {
  const uint32x4_t negative = vcltzq_s32(vreinterpretq_s32_f32(x));
  const Words z = splat_words(zero);
  return vbslq_u32(negative, vsubq_u32(z, n), vaddq_u32(z, n));
}
inline void store_bytes(uint8_t* out, const Words (&w)[4]) {
  int16x4_t halves[4];
  for (int i = 0; i < 4; ++i) halves[i] = vqmovn_s32(vreinterpretq_s32_u32(w[i]));
  vst1q_u8(out, vcombine_u8(vqmovun_s16(vcombine_s16(halves[0], halves[1])),
                            vqmovun_s16(vcombine_s16(halves[2], halves[3]))));
}
