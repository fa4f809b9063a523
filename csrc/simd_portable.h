// Primitives in plain C++, in loops of fixed length that compilers turn into vector instructions.
// Included inside a namespace; what they must do is said in nf4_kernels.h and dropout_kernels.h.

inline uint32_t abs_bits_max(const float* w, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(w[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

template <class T>
uint32_t abs_bits_max(const T* w, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = w[i].bits & 0x7fff;
    most = bits > most ? bits : most;
  }
  return most;
}

constexpr int64_t kWidth = 4;
constexpr int kTileRows = 4;

struct Vec {
  float v[kWidth];
};

template <class T>
Vec load(const T* p) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x.v[i] = to_float(p[i]);
  return x;
}

template <class T>
void store(T* p, const Vec& x) {
  for (int i = 0; i < kWidth; ++i) from_float(x.v[i], p + i);
}

inline Vec splat(float x) { return {{x, x, x, x}}; }

inline Vec add(const Vec& a, const Vec& b) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = a.v[i] + b.v[i];
  return y;
}

inline Vec subtract(const Vec& a, const Vec& b) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = a.v[i] - b.v[i];
  return y;
}

inline Vec multiply(const Vec& a, const Vec& b) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = a.v[i] * b.v[i];
  return y;
}

inline Vec divide(const Vec& a, const Vec& b) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = a.v[i] / b.v[i];
  return y;
}

inline Vec square_root(const Vec& x) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = sqrtf(x.v[i]);
  return y;
}

// two roundings: a fused one is a call of a function on most processors without more flags
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return add(multiply(a, b), c); }

template <class T>
Vec rounded(const Vec& x) {
  T narrowed[kWidth];
  store(narrowed, x);
  return load(narrowed);
}

struct Words {
  uint32_t v[kWidth];
};

inline Vec as_floats(const Words& x) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.v[i] = float_of_bits(x.v[i]);
  return y;
}

inline void load_words(const uint8_t* const* rows, int64_t at, Words (&w)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < kWidth; ++j) {
      const uint8_t* p = rows[j] + at + 4 * i;
      w[i].v[j] =
          uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
    }
  }
}

struct Lookup {
  const float* code;

  explicit Lookup(const float* code) : code(code) {}

  Vec operator()(const Words& words, int shift) const {
    Vec x;
    for (int i = 0; i < kWidth; ++i) x.v[i] = code[words.v[i] >> shift & 15];
    return x;
  }
};

struct Encoder {
  const float* thresholds;

  explicit Encoder(const float* thresholds) : thresholds(thresholds) {}

  template <class T>
  void operator()(const T* w, float r, uint8_t* out) const {
    float scaled[32];
    int32_t codes[32] = {};
    for (int i = 0; i < 32; ++i) scaled[i] = to_float(w[i]) * r;
    for (int t = 0; t < 15; ++t) {
      for (int i = 0; i < 32; ++i) codes[i] += scaled[i] > thresholds[t];
    }
    for (int i = 0; i < 16; ++i)
      out[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  }
};

template <class T>
struct Decoder {
  T values[16];

  Decoder(const float* code, float a) {
    for (int i = 0; i < 16; ++i) from_float(code[i] * a, &values[i]);
  }
  // values that were rounded to U
  template <class U>
  Decoder(const float* code, float a, const U*) {
    for (int i = 0; i < 16; ++i) {
      U value;
      from_float(code[i] * a, &value);
      values[i] = to_float(value);
    }
  }

  void operator()(const uint8_t* packed, T* out) const {
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = values[packed[i] >> 4];
      out[2 * i + 1] = values[packed[i] & 15];
    }
  }
};

constexpr int kLanes = 8;

struct Lanes {
  uint32_t v[kLanes];
};

inline Lanes broadcast(uint32_t x) {
  Lanes y;
  for (uint32_t& lane : y.v) lane = x;
  return y;
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  Lanes y;
  for (int i = 0; i < kLanes; ++i) y.v[i] = a.v[i] + b.v[i];
  return y;
}

inline void multiply(const Lanes& a, const Lanes& b, Lanes* high, Lanes* low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{a.v[i]} * b.v[i];
    high->v[i] = static_cast<uint32_t>(product >> 32);
    low->v[i] = static_cast<uint32_t>(product);
  }
}

inline Lanes xor3(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes y;
  for (int i = 0; i < kLanes; ++i) y.v[i] = a.v[i] ^ b.v[i] ^ c.v[i];
  return y;
}

inline Lanes lane_counters() { return {{0, 1, 2, 3, 4, 5, 6, 7}}; }

struct Halves {
  uint16_t v[4 * kLanes];
};

inline void halves(const Lanes (&words)[4], Halves* lower, Halves* upper) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint16_t* numbers = (lane < kLanes / 2 ? lower : upper)->v + lane % (kLanes / 2) * 8;
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = static_cast<uint16_t>(words[i].v[lane]);
      numbers[2 * i + 1] = static_cast<uint16_t>(words[i].v[lane] >> 16);
    }
  }
}

template <class T>
void drop(const Halves& numbers, uint32_t threshold, float scale, const T* x, T* out) {
  for (int i = 0; i < 4 * kLanes; ++i) {
    T kept;
    from_float(to_float(x[i]) * scale, &kept);
    out[i] = numbers.v[i] >= threshold ? kept : T{};
  }
}

// as `Codes` says, without moment_codes.h: vectors of a compiler's own making are no help there
template <bool kSigned>
struct MomentCodec {
  Codes codes;

  explicit MomentCodec(const Codes& codes) : codes(codes) {}

  void decode(const uint8_t* in, float scale, float* out) const {
    for (int64_t i = 0; i < kMomentBlock; ++i) out[i] = codes.values[in[i]] * scale;
  }

  void encode(const float* in, float r, uint8_t* out) const {
    for (int64_t i = 0; i < kMomentBlock; ++i) out[i] = code_of<kSigned>(codes, in[i], r);
  }
};
