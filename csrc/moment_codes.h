// Blocks of 8-bit moments to numbers and back.
//
// Included inside the namespace of an instruction set, after its simd_*.h, which defines, beside
// Vec, Words and Lookup of panel_kernels.h:
//   decode_block<kSigned>(values, in, scale, out)   a block of codes to numbers
//   at_least(x, low), smaller(a, b)                 max(|x|, low), min(a, b)
//   as_words(x), integers(x)                        bits of x; x >= 0 to the nearest integer
//   shifted(n, right), both(a, b), differing(a, b)  n >> right, a & b, a ^ b
//   least(a, b), any_zero(n)                        of numbers without sign
//   add_if_above(n, a, b)                           n + (a > b)
//   if_positive(n, x), steps_from(zero, n, x)       x > 0 ? n : 0; x < 0 ? zero - n : zero + n
//   store_bytes(out, words)                         four Words, those below 0 as 0

// Codes by arithmetic: what `Codes` asks for would be two gathers a number, which take several
// times as long.
//
// Counted from zero, codes come in runs of equal distances, a decade each: that of x is
// floor(slope |x| + offset), unless x is so close to a midpoint that rounding decides, and then it
// is done as `Codes` says.
template <bool kSigned>
struct MomentCodec {
  Codes codes;
  // of a run: in kOne-ths
  float slope[16] = {}, offset[16] = {}, largest[16] = {};
  // of numbers in [2^(2 i - 31), 2^(2 i - 29)): the run of the first, and where the next one begins
  float run[16], next[16];

  explicit MomentCodec(const Codes& codes) : codes(codes) {
    for (int i = 0; i < kRuns; ++i) {
      // the second moment is never zero if it is above
      const int first = i == 0 && !kSigned ? 1 : first_of(i);
      const int last = i == 0 ? first : first_of(i + 1) - 1;
      const double low = codes.values[kZero + first], high = codes.values[kZero + last];
      const double steps = first < last ? (last - first) / (high - low) : 0;
      slope[i] = static_cast<float>(kOne * steps);
      offset[i] = static_cast<float>(kOne * (first + 0.5 - low * steps) + kUnsure);
      largest[i] = static_cast<float>(kOne * (last + 0.5));
    }
    float power = 0x1p-31f;
    uint32_t begun = 0;
    for (int i = 0; i < 16; ++i, power *= 4) {
      while (begun + 1 < kRuns && begin_of(begun + 1) < power) ++begun;
      run[i] = float_of_bits(begun);
      next[i] = begun + 1 < kRuns ? begin_of(begun + 1) : 2;
    }
  }

  void decode(const uint8_t* in, float scale, float* out) const {
    decode_block<kSigned>(codes.values, in, scale, out);
  }

  void encode(const float* in, float r, uint8_t* out) const {
    const Rulers rulers(*this);
    for (int64_t i = 0; i < kMomentBlock; i += 4 * kWidth) {
      Words code[4], doubt = splat_words(-1);
      for (int j = 0; j < 4; ++j) code[j] = rulers.code(load(in + i + j * kWidth), r, &doubt);
      store_bytes(out + i, code);
      if (any_zero(doubt)) encode_exactly(in + i, r, out + i);
    }
  }

 private:
  static constexpr int kZero = kSigned ? 127 : 0;  // its code
  static constexpr int kRuns = 9;                  // zero, seven decades, one
  static constexpr int kDigits = 15;
  static constexpr int kOne = 1 << kDigits;
  static constexpr int kUnsure = 2;  // twice what rounding adds up to

  // how far the first code of a run is from zero
  static int first_of(int i) {
    if (i == 0) return 0;
    if (i == kRuns) return 256 - kZero;
    return kSigned ? 1 << (i - 1) : (1 << i) - 1;
  }

  float begin_of(int i) const { return codes.midpoints[kZero + first_of(i) - 1]; }

  void encode_exactly(const float* in, float r, uint8_t* out) const {
    for (int64_t i = 0; i < 4 * kWidth; ++i) out[i] = code_of<kSigned>(codes, in[i], r);
  }

  // the tables, in registers
  struct Rulers {
    Lookup slope, offset, largest, run, next;

    explicit Rulers(const MomentCodec& codec)
        : slope(codec.slope),
          offset(codec.offset),
          largest(codec.largest),
          run(codec.run),
          next(codec.next) {}

    // clears a word of `doubt` where the code is uncertain
    Words code(Vec number, float r, Words* doubt) const {
      const Vec x = multiply(number, splat(r)), size = at_least(x, splat(0x1p-31f));
      const Words bits = as_words(size);
      const Vec border = next(bits, 24);
      const Words runs = add_if_above(as_words(run(bits, 24)), size, border);
      const Vec place = smaller(fma(size, slope(runs, 0), offset(runs, 0)), largest(runs, 0));
      const Words parts = integers(place), n = shifted(parts, kDigits);
      *doubt = least(*doubt, both(parts, splat_words(kOne - 2 * kUnsure)));
      if (!kSigned) return if_positive(n, number);
      // a code ends with its upper midpoint, which on the other side of zero is the near one
      *doubt = least(*doubt, differing(bits, as_words(border)));
      return steps_from(kZero, n, x);
    }
  };
};
