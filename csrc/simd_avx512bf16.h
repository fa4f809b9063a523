// What AVX-512 BF16 adds to simd_avx512.h: products of pairs. Included inside a namespace.

#if defined(FASTLORA_EMULATE)
// The same numbers, up to the order of two sums, on processors without the instructions: for tests.
inline Vec first_of(Vec pairs) {
  return as_floats(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
inline Vec second_of(Vec pairs) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return as_floats(_mm512_and_si512(_mm512_castps_si512(pairs), upper));
}
inline Vec dot_pairs(Vec sums, Vec x, Vec w) {
  return fma(first_of(x), first_of(w), fma(second_of(x), second_of(w), sums));
}
inline Words narrowed(Vec x) { return narrow(x, static_cast<const Bf16*>(nullptr)); }
#else
inline Vec dot_pairs(Vec sums, Vec x, Vec w) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}
inline Words narrowed(Vec x) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

// Two bf16 numbers in a slot: twice the products of an instruction, and half the bytes.
struct PairFormat {
  using Number = Bf16;
  static constexpr int64_t kPerSlot = 2;
  static constexpr int kRows = kTileRows;

  static Vec accumulate(Vec x, Vec w, Vec sums) { return dot_pairs(sums, x, w); }

  static void pack_run(const Bf16* in, int64_t count, float* out) {
    if (count % 2 != 0) out[count / 2] = 0;
    memcpy(out, in, count * sizeof(Bf16));
  }

  // count is a multiple of kWidth
  static void pack_rows(const Bf16* first, const Bf16* second, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kWidth) {
      store(out + i, joined(_mm512_cvtepu16_epi32(load256(first + i)),
                            _mm512_cvtepu16_epi32(load256(second + i))));
    }
  }

  static Vec pack(Vec first, Vec second) { return joined(narrowed(first), narrowed(second)); }

 private:
  static Vec joined(Words low, Words high) {
    return as_floats(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
