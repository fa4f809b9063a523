// Bits and conversions of single numbers. Included inside the namespace of one instruction set.

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }

// without branches, so that loops of it vectorise
inline float to_float(Fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, bits = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = bits + (112u << 23);  // bias 15 to bias 127
  // a subnormal half has no implicit one: give it one and take it away again, exactly
  const uint32_t subnormal =
      bits_of(float_of_bits(normal + (1u << 23)) - float_of_bits(113u << 23));
  const uint32_t finite = bits < 1u << 23 ? subnormal : normal;
  return float_of_bits(sign | (bits < 0x0f800000u ? finite : bits | 0x7f800000u));
}

// round to nearest, ties to even; NaN stays NaN
inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, Bf16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void from_float(float x, Fp16* out) {
  const uint32_t sign = (bits_of(x) & 0x80000000u) >> 16, bits = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // below 2^-14 the addition rounds to a multiple of 2^-24
  const uint32_t subnormal = bits_of(float_of_bits(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = bits < 0x38800000u ? subnormal : normal;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or 65536 and more
  out->bits = static_cast<uint16_t>(sign | (bits < 0x47800000u ? finite : special));
}

// the number of absolute value `bits`, in the bits of T
inline float magnitude(uint32_t bits, const float*) { return float_of_bits(bits); }
inline float magnitude(uint32_t bits, const Fp16*) {
  return to_float(Fp16{static_cast<uint16_t>(bits)});
}
inline float magnitude(uint32_t bits, const Bf16*) {
  return to_float(Bf16{static_cast<uint16_t>(bits)});
}

inline bool is_finite(float x) { return (bits_of(x) & 0x7fffffffu) < 0x7f800000u; }

// Asks for the lines of some bytes, to be read or written soon.
inline void prefetch(const void* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
#endif
}

inline void prefetch_for_write(const void* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 1);
#endif
}

// Code of number * r, which is finite.
template <bool kSigned>
uint8_t code_of(const Codes& codes, float number, float r) {
  const float x = number * r;
  const uint8_t guess = codes.guess[bits_of(x) >> 16];
  const uint8_t code = static_cast<uint8_t>(guess + (x > codes.midpoints[guess]));
  // the first moment is divided by the root of the second, which must not vanish
  return !kSigned && code == 0 && number > 0 ? 1 : code;
}
