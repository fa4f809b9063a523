// A step of AdamW over the primitives of one instruction set; fastlora/optim/reference.py says what
// it computes, rounding by rounding.
//
// Included inside the namespace of that instruction set, after its simd_*.h, which defines
// subtract, divide and square_root beside what tile_kernels.h says, and after its MomentCodec:
// moment_codes.h. Bound by memory with 32-bit moments: 28 (fp32) or 22 bytes (fp16, bf16) an
// element; by arithmetic with 8-bit ones, 16 or 10 bytes.

// a row of `hypers`
struct AdamWRow {
  Vec decay, step_size, correction, eps, rest1, beta2, rest2, sign;

  explicit AdamWRow(const float* h)
      : decay(splat(h[0])),
        step_size(splat(h[1])),
        correction(splat(h[2])),
        eps(splat(h[3])),
        rest1(splat(h[4])),
        beta2(splat(h[5])),
        rest2(splat(h[6])),
        sign(splat(h[7])) {}

  // kWidth elements
  template <class T>
  void update(T* w, const T* g, float* m, float* v) const {
    const Vec up = multiply(load(g), sign), before = load(m);
    const Vec first = add(before, multiply(rest1, subtract(up, before)));
    const Vec second = add(multiply(beta2, load(v)), multiply(multiply(rest2, up), up));
    const Vec size = add(multiply(square_root(second), correction), eps);
    store(m, first);
    store(v, second);
    store(w, subtract(multiply(load(w), decay), multiply(step_size, divide(first, size))));
  }
};

template <class T>
void adamw_part(const AdamWRow& row, T* w, const T* g, float* m, float* v, int64_t count) {
  const int64_t whole = count / kWidth * kWidth, rest = count - whole;
  for (int64_t i = 0; i < whole; i += kWidth) row.update(w + i, g + i, m + i, v + i);
  if (rest == 0) return;
  T last_w[kWidth] = {}, last_g[kWidth] = {};
  float last_m[kWidth] = {}, last_v[kWidth] = {};
  memcpy(last_w, w + whole, rest * sizeof(T));
  memcpy(last_g, g + whole, rest * sizeof(T));
  memcpy(last_m, m + whole, rest * sizeof(float));
  memcpy(last_v, v + whole, rest * sizeof(float));
  row.update(last_w, last_g, last_m, last_v);
  memcpy(w + whole, last_w, rest * sizeof(T));
  memcpy(m + whole, last_m, rest * sizeof(float));
  memcpy(v + whole, last_v, rest * sizeof(float));
}

// The parameter that an element of the vector belongs to.
inline int64_t param_at(const AdamW& a, int64_t element) {
  int64_t low = 0, high = a.count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (a.starts[middle] <= element ? low : high) = middle;
  }
  return low;
}

// Updates elements [first, last), whose moments are m and v; `param` is that of the first, then
// that of the last. Returns whether there was anything to update.
template <class T>
bool adamw_parts(const AdamW& a, int64_t* param, int64_t first, int64_t last, float* m, float* v) {
  bool updated = false;
  for (int64_t at = first; at < last;) {
    while (a.starts[*param + 1] <= at) ++*param;
    const int64_t start = a.starts[*param], next = a.starts[*param + 1];
    const int64_t end = next < last ? next : last;
    if (a.grads[*param] != nullptr) {
      T* w = static_cast<T*>(a.params[*param]) + (at - start);
      const T* g = static_cast<const T*>(a.grads[*param]) + (at - start);
      const AdamWRow row(a.hypers + 8 * a.rows[*param]);
      adamw_part(row, w, g, m + (at - first), v + (at - first), end - at);
      updated = true;
    }
    at = end;
  }
  return updated;
}

template <class T>
void adamw32(const AdamW& args, int64_t first, int64_t last) {
  int64_t param = param_at(args, first);
  const int64_t at = first - args.first;
  adamw_parts<T>(args, &param, first, last, static_cast<float*>(args.m) + at,
                 static_cast<float*>(args.v) + at);
}

// One of the two moments of a span.
template <bool kSigned>
struct Moment {
  MomentCodec<kSigned> codec;
  uint8_t* codes;
  float* scales;
  uint8_t zero_code;

  Moment(const Codes& tables, void* codes, float* scales)
      : codec(tables),
        codes(static_cast<uint8_t*>(codes)),
        scales(scales),
        zero_code(code_of<kSigned>(tables, 0.0f, 1.0f)) {}

  void decode(int64_t block, int64_t count, float* out) const {
    const uint8_t* in = codes + block * kMomentBlock;
    uint8_t padded[kMomentBlock];
    if (count < kMomentBlock) {
      memset(padded, zero_code, sizeof(padded));
      memcpy(padded, in, count);
      in = padded;
    }
    codec.decode(in, scales[block], out);
    // not NaN, if the scale is
    memset(out + count, 0, (kMomentBlock - count) * sizeof(float));
  }

  // `in` is a whole block, with zeros after `count` numbers
  void encode(const float* in, int64_t block, int64_t count) const {
    uint8_t* out = codes + block * kMomentBlock;
    uint8_t padded[kMomentBlock];
    const float scale = float_of_bits(abs_bits_max(in, kMomentBlock));
    scales[block] = scale;
    uint8_t* whole = count < kMomentBlock ? padded : out;
    const float r = 1.0f / scale;
    if (is_finite(r) && r > 0) {
      codec.encode(in, r, whole);
    } else {
      encode_without_scale(in, whole);
    }
    if (whole != out) memcpy(out, whole, count);
  }

  // all is times 0: NaN, which is above all midpoints, or zero
  void encode_without_scale(const float* in, uint8_t* out) const {
    for (int64_t i = 0; i < kMomentBlock; ++i) {
      const uint8_t least = !kSigned && in[i] > 0 ? 1 : zero_code;
      out[i] = is_finite(in[i]) ? least : 255;
    }
  }
};

template <class T>
void adamw8(const AdamW& args, int64_t first, int64_t last) {
  const AdamW a = args;  // a copy, which the bytes written cannot alias
  const Moment<true> m(a.m_codes, a.m, a.m_scale);
  const Moment<false> v(a.v_codes, a.v, a.v_scale);
  int64_t param = param_at(a, first);
  alignas(64) float m_numbers[kMomentBlock], v_numbers[kMomentBlock];
  for (int64_t at = first; at < last; at += kMomentBlock) {
    const int64_t block = (at - a.first) / kMomentBlock;
    const int64_t count = last - at < kMomentBlock ? last - at : kMomentBlock;
    m.decode(block, count, m_numbers);
    v.decode(block, count, v_numbers);
    // decoded and encoded again, moments would change
    if (!adamw_parts<T>(a, &param, at, at + count, m_numbers, v_numbers)) continue;
    m.encode(m_numbers, block, count);
    v.encode(v_numbers, block, count);
  }
}
