// Calls every function of the C ABI with odd shapes, in every instruction set that runs here, or in
// those that the only argument names.
//
// Expects what plain formulas give, in fp64 or, where the contract is about bytes, in the same
// bytes; and that nothing outside an output is written and nothing past an input is read.
#include <algorithm>
#include <functional>
#include <numeric>
#include <string>

#include "adamw.h"
#include "everywhere.h"
#include "values.h"

namespace {

constexpr double kScale = 0.75;  // a power of two but for one bit: exact in all dtypes
constexpr int64_t kState[] = {-0x123456789abcdef, 0x500000007};
constexpr uint32_t kThreshold = 20000;
const float kKeepScale = 65536.0f / (65536 - kThreshold);

// --- NF4 -------------------------------------------------------------------------------------

const std::vector<float> kCode = {-1.0f, -0.7f, -0.53f, -0.39f, -0.28f, -0.18f, -0.09f, 0.0f,
                                  0.08f, 0.16f, 0.25f,  0.34f,  0.44f,  0.56f,  0.72f,  1.0f};

std::vector<float> thresholds() {
  std::vector<float> t;
  for (int i = 0; i < 15; ++i) t.push_back((kCode[i] + kCode[i + 1]) / 2);
  return t;
}

// A random packed weight, its scales flat or nested. Some flat ones lie between two numbers of 16
// bits; wild ones take fp16 below its smallest and above its largest number.
class Weight {
 public:
  Weight(int64_t n, int64_t k, int64_t blocksize, bool nested, Random& random, bool wild = false)
      : k_(k),
        blocksize_(blocksize),
        nested_(nested),
        packed_(bytes(ceil_div(n * k, 2), random)),
        absmax_(scales(ceil_div(n * k, blocksize), random, wild)),
        codes_(bytes(ceil_div(n * k, blocksize), random)),
        absmax2_(floats(ceil_div(ceil_div(n * k, blocksize), 256), random)),
        code2_(floats(256, random)),
        offset_(floats(1, random)),
        code_(kCode),
        abi_{packed_.get(),
             nested ? nullptr : absmax_.get(),
             nested ? codes_.get() : nullptr,
             nested ? absmax2_.get() : nullptr,
             nested ? code2_.get() : nullptr,
             nested ? offset_.get() : nullptr,
             code_.get(),
             n,
             k,
             blocksize} {}

  const fastlora_nf4& abi() const { return abi_; }

  double operator()(int64_t n, int64_t k, int dtype) const { return at(n * k_ + k, dtype); }

  // Three roundings to fp32 and one to the dtype.
  double at(int64_t i, int dtype) const {
    const int64_t block = i / blocksize_;
    float scale = absmax_[block];
    if (nested_) {
      const float product = code2_[codes_[block]] * absmax2_[block / 256];
      scale = product + offset_[0];
    }
    const float value = code_[packed_[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale;
    return rounded(value, dtype);
  }

 private:
  static std::vector<uint8_t> bytes(int64_t count, Random& random) {
    std::vector<uint8_t> values(count);
    for (uint8_t& x : values) x = static_cast<uint8_t>(random() >> 8);
    return values;
  }
  static std::vector<float> floats(int64_t count, Random& random) {
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(random.between(0.5, 1.5));
    return values;
  }

  static std::vector<float> scales(int64_t count, Random& random, bool wild) {
    constexpr float kTies[] = {1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1p-11f, 1 + 0x3p-11f};
    constexpr float kWild[] = {1e-8f, 3e-6f, 65504.0f, 65530.0f, 1e9f};
    std::vector<float> values = floats(count, random);
    for (int64_t i = 0; i < count; i += 2) values[i] = kTies[random() % 4];
    for (int64_t i = 1; wild && i < count; i += 2) values[i] = kWild[random() % 5];
    return values;
  }

  int64_t k_, blocksize_;
  bool nested_;
  Array<uint8_t> packed_;
  Array<float> absmax_;
  Array<uint8_t> codes_;
  Array<float> absmax2_, code2_, offset_, code_;
  fastlora_nf4 abi_;
};

void test_dequantize(int64_t count, int64_t blocksize, bool nested, int dtype) {
  Random random;
  const Weight weight(1, count, blocksize, nested, random, true);
  const fastlora_nf4& w = weight.abi();
  Values exact;
  for (int64_t i = 0; i < count; ++i) exact.push_back(weight.at(i, dtype));
  everywhere("dequantize " + std::to_string(count), [&](int threads) {
    Output out("weights", 1, count, kItemSize[dtype]);
    fastlora_dequantize_blocks(w.packed, w.absmax, w.absmax_codes, w.absmax2, w.code2, w.offset,
                               w.code, count, blocksize, dtype, out.data(), threads);
    out.expect_bytes(encoded(exact, dtype));
  });
}

void test_nan_scale(int dtype) {
  const Array<uint8_t> packed(std::vector<uint8_t>(32, 0x1f));
  // adding the half of rounding to nearest would carry into the sign
  uint32_t bits = 0x7fffffff;
  float nan = 0;
  std::memcpy(&nan, &bits, sizeof(nan));
  const Array<float> absmax({nan}), code(kCode);
  everywhere("a scale that is NaN", [&](int threads) {
    Output out("weights", 1, 64, kItemSize[dtype]);
    out.set(Values(64), dtype);
    fastlora_dequantize_blocks(packed.get(), absmax.get(), nullptr, nullptr, nullptr, nullptr,
                               code.get(), 64, 64, dtype, out.data(), threads);
    for (int64_t i = 0; i < 64; ++i) {
      if (!std::isnan(decode(out.data() + i * kItemSize[dtype], dtype)))
        fail("weights", "no NaN", i);
    }
  });
}

void test_quantize(int64_t count, int64_t blocksize, int dtype) {
  Random random;
  Matrix w(1, count, 0, dtype, random);
  const std::vector<float> steps = thresholds();
  const Array<float> thresholds(steps);
  const int64_t blocks = ceil_div(count, blocksize);
  Values absmax(blocks);
  std::vector<uint8_t> codes(count + count % 2, 7);
  for (int64_t i = 0; i < count; ++i) {
    absmax[i / blocksize] = std::max(absmax[i / blocksize], std::fabs(w(0, i)));
  }
  for (int64_t i = 0; i < count; ++i) {
    const float scaled =
        static_cast<float>(w(0, i)) * (1.0f / static_cast<float>(absmax[i / blocksize]));
    codes[i] = static_cast<uint8_t>(
        std::count_if(steps.begin(), steps.end(), [&](float t) { return scaled > t; }));
  }
  std::vector<uint8_t> packed;
  for (int64_t i = 0; i < count; i += 2) packed.push_back(codes[i] << 4 | codes[i + 1]);
  everywhere("quantize " + std::to_string(count), [&](int threads) {
    Output out("codes", 1, ceil_div(count, 2), 1), scales("scales", 1, blocks, sizeof(float));
    const int64_t nonfinite =
        fastlora_quantize_blocks(w.data(), dtype, count, blocksize, thresholds.get(), out.data(),
                                 reinterpret_cast<float*>(scales.data()), threads);
    if (nonfinite != 0) fail("weights", "not finite", nonfinite);
    out.expect_bytes(packed);
    scales.expect_bytes(encoded(absmax, FASTLORA_FP32));
  });
}

void test_quantize_stats(int64_t blocks) {
  Random random;
  std::vector<float> scales(blocks);
  for (float& x : scales) x = static_cast<float>(random.between(0, 1));
  const Array<float> absmax(scales), offset({0.5f});
  std::vector<uint8_t> table(65536), codes;
  for (int i = 0; i < 65536; ++i) table[i] = static_cast<uint8_t>(i >> 8);
  const Array<uint8_t> lut(table);
  Values largest(ceil_div(blocks, 256));
  for (int64_t i = 0; i < blocks; ++i) {
    const float d = scales[i] - 0.5f;
    largest[i / 256] = std::max<double>(largest[i / 256], std::fabs(d));
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const float r = 1.0f / static_cast<float>(largest[i / 256]), d = scales[i] - 0.5f;
    const float product = d * r, scaled = (product + 1.0f) * 32767.5f;
    codes.push_back(table[static_cast<int>(scaled + 0.5f)]);
  }
  everywhere("stats " + std::to_string(blocks), [&](int threads) {
    Output out("codes", 1, blocks, 1), groups("scales", 1, ceil_div(blocks, 256), sizeof(float));
    fastlora_quantize_stats(absmax.get(), blocks, offset.get(), lut.get(), out.data(),
                            reinterpret_cast<float*>(groups.data()), threads);
    out.expect_bytes(codes);
    groups.expect_bytes(encoded(largest, FASTLORA_FP32));
  });
}

// --- dropout ---------------------------------------------------------------------------------

// Philox4x32 with 7 rounds: half of word (k % 8) / 2 of counter (k / 8, m, 0, offset).
bool kept(int64_t m, int64_t k) {
  uint32_t c[] = {static_cast<uint32_t>(k / 8), static_cast<uint32_t>(m), 0,
                  static_cast<uint32_t>(kState[1])};
  uint32_t key0 = static_cast<uint32_t>(kState[0]);
  uint32_t key1 = static_cast<uint32_t>(static_cast<uint64_t>(kState[0]) >> 32);
  for (int round = 0; round < 7; ++round, key0 += 0x9e3779b9u, key1 += 0xbb67ae85u) {
    const uint64_t p = uint64_t{c[0]} * 0xd2511f53u, q = uint64_t{c[2]} * 0xcd9e8d57u;
    const uint32_t first = static_cast<uint32_t>(q >> 32) ^ c[1] ^ key0;
    const uint32_t third = static_cast<uint32_t>(p >> 32) ^ c[3] ^ key1;
    c[0] = first;
    c[1] = static_cast<uint32_t>(q);
    c[2] = third;
    c[3] = static_cast<uint32_t>(p);
  }
  return (c[k % 8 / 2] >> (k % 2 * 16) & 0xffff) >= kThreshold;
}

double dropped(double x, int64_t m, int64_t k, int dtype) {
  return kept(m, k) ? rounded(static_cast<float>(x) * kKeepScale, dtype) : 0;
}

void test_dropout(int64_t m, int64_t k, int64_t padding, int dtype) {
  Random random;
  const Matrix x(m, k, padding, dtype, random);
  const Array<int64_t> state({kState[0], kState[1]});
  Values exact;
  for (int64_t i = 0; i < m * k; ++i) exact.push_back(dropped(x.values()[i], i / k, i % k, dtype));
  everywhere("dropout " + std::to_string(k), [&](int threads) {
    Output out("dropped", m, k, kItemSize[dtype]);
    fastlora_dropout(x.data(), dtype, x.stride(), m, k, state.get(), kThreshold, kKeepScale,
                     out.data(), threads);
    out.expect_bytes(encoded(exact, dtype));
  });
}

// --- linear layers ---------------------------------------------------------------------------

struct Shape {
  int64_t m, k, n, r, blocksize;
  bool nested;
};

constexpr Shape kShapes[] = {
    {0, 64, 33, 4, 64, true},         // no tokens
    {1, 1, 1, 1, 32, false},          //
    {1, 480, 301, 3, 64, true},       // one token, an odd number of chunks
    {1, 512, 65, 16, 32, true},       // an even one, of several scales
    {2, 1088, 97, 8, 128, false},     // two tokens
    {5, 31, 31, 3, 32, true},         // below every unit, k odd: codes one by one
    {16, 96, 300, 16, 64, true},      // blocks straddle rows
    {57, 300, 65, 33, 128, false},    // k no multiple of 32; one row, one rank above a unit
    {13, 257, 129, 64, 64, true},     // one column above a panel and a block of columns
    {5, 576, 97, 130, 4096, true},    // panels of unequal depth; ranks in two passes
    {513, 65, 33, 3, 512, false},     // one row above a block of rows
    {2, 2081, 33, 257, 1024, false},  // more columns than are packed at once
    {3, 64, 2085, 5, 2048, true},     // the same for dy
    {15, 512, 128, 16, 64, true},     // everything whole
};

using Element = std::function<double(int64_t, int64_t)>;

// [rows, columns]: the sum over `depth` of left(i, k) right(k, j)
Values product(
    int64_t rows, int64_t columns, int64_t depth, const Element& left, const Element& right) {
  Values lefts(rows * depth), rights(depth * columns), sums(rows * columns);
  for (int64_t i = 0; i < rows * depth; ++i) lefts[i] = left(i / depth, i % depth);
  for (int64_t i = 0; i < depth * columns; ++i) rights[i] = right(i / columns, i % columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < columns; ++j) {
        sums[i * columns + j] += lefts[i * depth + k] * rights[k * columns + j];
      }
    }
  }
  return sums;
}

Values sum(const Values& a, const Values& b, double scale = 1) {
  Values sums;
  for (size_t i = 0; i < a.size(); ++i) sums.push_back(a[i] + scale * b[i]);
  return sums;
}

class Layer {
 public:
  Layer(const Shape& shape, int64_t padding, int dtype)
      : m_(shape.m),
        k_(shape.k),
        n_(shape.n),
        r_(shape.r),
        dtype_(dtype),
        item_(kItemSize[dtype]),
        name_("linear " + std::to_string(shape.m) + " " + std::to_string(shape.k) + " " +
              std::to_string(shape.n) + " " + std::to_string(shape.r) + " dtype " +
              std::to_string(dtype)),
        w_(shape.n, shape.k, shape.blocksize, shape.nested, random_),
        x_(m_, k_, padding, dtype, random_),
        a_(r_, k_, padding, dtype, random_),
        b_(n_, r_, padding, dtype, random_),
        s_(m_, r_, padding, dtype, random_),
        dy_(m_, n_, padding, dtype, random_),
        bias_(1, n_, 0, dtype, random_),
        y_(m_, n_, 0, dtype, random_),
        dx_(m_, k_, 0, dtype, random_),
        state_({kState[0], kState[1]}) {}

  void test_down(bool drop) {
    const auto x = [&](int64_t i, int64_t k) {
      return drop ? dropped(x_(i, k), i, k, dtype_) : x_(i, k);
    };
    const auto s_of = [&](int64_t i, int64_t j) { return s_(j, i); };
    const Values s = product(m_, r_, k_, x, [&](int64_t k, int64_t j) { return a_(j, k); });
    const Values da = product(r_, k_, m_, s_of, x);
    const int64_t* state = drop ? state_.get() : nullptr;
    everywhere(name_, [&](int threads) {
      Output out("s", m_, r_, item_), reduced("da", r_, k_, sizeof(float));
      fastlora_lora_down(x_.data(), x_.stride(), dtype_, m_, k_, a_.data(), a_.stride(), r_, state,
                         kThreshold, kKeepScale, out.data(), threads);
      out.expect(s, dtype_);
      fastlora_lora_bwd_da(x_.data(), x_.stride(), dtype_, m_, k_, s_.data(), s_.stride(), r_,
                           state, kThreshold, kKeepScale, reinterpret_cast<float*>(reduced.data()),
                           threads);
      reduced.expect(da, FASTLORA_FP32);
    });
  }

  void test_linear() {
    Values base = product(
        m_, n_, k_, [&](int64_t i, int64_t k) { return x_(i, k); },
        [&](int64_t k, int64_t j) { return w_(j, k, dtype_); });
    const Values lora = product(
        m_, n_, r_, [&](int64_t i, int64_t k) { return s_(i, k); },
        [&](int64_t k, int64_t j) { return b_(j, k); });
    Values biased = base;
    for (int64_t i = 0; i < m_ * n_; ++i) biased[i] += bias_(0, i % n_);
    everywhere(name_, [&](int threads) {
      linear(&w_.abi(), nullptr, 0, nullptr, threads).expect(base, dtype_);
      linear(&w_.abi(), bias_.data(), 0, nullptr, threads).expect(biased, dtype_);
      linear(&w_.abi(), bias_.data(), r_, nullptr, threads)
          .expect(sum(biased, lora, kScale), dtype_);
      linear(nullptr, nullptr, r_, &y_.values(), threads)
          .expect(sum(y_.values(), lora, kScale), dtype_);
    });
  }

  // Products with an identity are the decoded weight, to the bit.
  void test_weight() {
    Values w;
    for (int64_t i = 0; i < n_ * k_; ++i) w.push_back(w_.at(i, dtype_));
    Values transposed;
    for (int64_t i = 0; i < n_ * k_; ++i) transposed.push_back(w[i % n_ * k_ + i / n_]);
    const Matrix x = identity(k_), dy = identity(n_);
    const void* dys[] = {dy.data()};
    const int64_t strides[] = {dy.stride()};
    everywhere(name_, [&](int threads) {
      Output y("w^T", k_, n_, item_), dx("w", n_, k_, item_);
      fastlora_linear(x.data(), x.stride(), dtype_, k_, n_, &w_.abi(), nullptr, nullptr, 0, nullptr,
                      0, 0, 0, y.data(), threads);
      y.expect_bytes(encoded(transposed, dtype_));
      fastlora_linear_dx(dys, strides, &w_.abi(), 1, dtype_, n_, k_, nullptr, 0, nullptr, 0, 0,
                         nullptr, 0, 0, 0, dx.data(), threads);
      dx.expect_bytes(encoded(w, dtype_));
    });
  }

  void test_ds_db() {
    const Values ds = product(
        m_, r_, n_, [&](int64_t i, int64_t k) { return kScale * dy_(i, k); },
        [&](int64_t k, int64_t j) { return b_(k, j); });
    const Values db = product(
        n_, r_, m_, [&](int64_t i, int64_t k) { return kScale * dy_(k, i); },
        [&](int64_t k, int64_t j) { return s_(k, j); });
    everywhere(name_, [&](int threads) {
      Output out("ds", m_, r_, item_, 7), reduced("db", n_, r_, sizeof(float));
      fastlora_lora_bwd_ds_db(dy_.data(), dy_.stride(), dtype_, m_, n_, b_.data(), b_.stride(),
                              s_.data(), s_.stride(), r_, kScale, out.data(), out.stride(),
                              reinterpret_cast<float*>(reduced.data()), threads);
      out.expect(ds, dtype_);
      reduced.expect(db, FASTLORA_FP32);
    });
  }

  void test_dx() {
    const Values base = product(
        m_, k_, n_, [&](int64_t i, int64_t k) { return dy_(i, k); },
        [&](int64_t k, int64_t j) { return w_(k, j, dtype_); });
    const Values lora = product(
        m_, k_, r_, [&](int64_t i, int64_t k) { return s_(i, k); },
        [&](int64_t k, int64_t j) { return a_(k, j); });
    Values masked = lora;
    for (int64_t i = 0; i < m_ * k_; ++i) masked[i] *= kept(i / k_, i % k_) ? kKeepScale : 0;
    everywhere(name_, [&](int threads) {
      dx(1, 0, false, false, threads).expect(base, dtype_);
      dx(2, r_, false, false, threads).expect(sum(lora, base, 2), dtype_);
      dx(1, r_, true, true, threads).expect(sum(sum(masked, base), dx_.values()), dtype_);
      dx(0, r_, true, true, threads).expect(sum(masked, dx_.values()), dtype_);
    });
  }

 private:
  Matrix identity(int64_t size) const {
    Values values(size * size);
    for (int64_t i = 0; i < size; ++i) values[i * size + i] = 1;
    return {values, size, size, 1, dtype_};
  }

  Output linear(
      const fastlora_nf4* w, const void* bias, int64_t r, const Values* before, int threads) {
    Output y("y", m_, n_, item_);
    if (before != nullptr) y.set(*before, dtype_);
    fastlora_linear(x_.data(), x_.stride(), dtype_, m_, n_, w, bias, r ? s_.data() : nullptr,
                    s_.stride(), r ? b_.data() : nullptr, b_.stride(), r, kScale, y.data(),
                    threads);
    return y;
  }

  Output dx(int64_t count, int64_t r, bool drop, bool accumulate, int threads) {
    Output dx("dx", m_, k_, item_);
    if (accumulate) dx.set(dx_.values(), dtype_);
    const std::vector<const void*> dys(count, dy_.data());
    const std::vector<int64_t> strides(count, dy_.stride());
    const std::vector<fastlora_nf4> weights(count, w_.abi());
    fastlora_linear_dx(dys.data(), strides.data(), weights.data(), count, dtype_, m_, k_,
                       r ? s_.data() : nullptr, s_.stride(), r ? a_.data() : nullptr, a_.stride(),
                       r, drop ? state_.get() : nullptr, kThreshold, kKeepScale, accumulate,
                       dx.data(), threads);
    return dx;
  }

  Random random_;
  int64_t m_, k_, n_, r_;
  int dtype_;
  int64_t item_;
  std::string name_;
  Weight w_;
  Matrix x_, a_, b_, s_, dy_, bias_, y_, dx_;
  Array<int64_t> state_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) tested() = argv[1];
  // of one element; blocks of several parameters, one of them empty; work for threads
  const std::vector<int64_t> kSizes[] = {{1}, {3, 250, 300, 0, 1, 513, 40}, {70001, 2, 5, 3000}};
  const CodeTables m_tables(true), v_tables(false);
  for (int dtype : kDtypes) {
    for (int64_t count : {1, 2, 31, 33, 64, 127, 5001, 70033}) {
      for (int64_t blocksize : {32, 64, 4096}) {
        test_quantize(count, blocksize, dtype);
        test_dequantize(count, blocksize, false, dtype);
        test_dequantize(count, blocksize, true, dtype);
      }
    }
    test_nan_scale(dtype);
    for (int64_t k : {1, 27, 64, 129, 9001}) {
      test_dropout(9, k, 0, dtype);
      test_dropout(3, k, 5, dtype);
    }
    for (const auto& sizes : kSizes) {
      const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
      AdamW(sizes, 0, count, dtype).test32();
      AdamW(sizes, count / 3, count / 2, dtype).test32();
      AdamW(sizes, 0, count, dtype).test8(m_tables, v_tables);
      if (count > 512) AdamW(sizes, 256, count - 257, dtype).test8(m_tables, v_tables);
    }
    for (const Shape& shape : kShapes) {
      // rows that are neighbours, and rows that are neither that nor aligned
      Layer layer(shape, dtype == FASTLORA_FP32 ? 0 : 3, dtype);
      layer.test_down(false);
      layer.test_down(true);
      layer.test_linear();
      layer.test_ds_db();
      layer.test_dx();
      if (shape.k <= 600 && shape.n <= 600) layer.test_weight();
    }
  }
  for (int64_t blocks : {1, 255, 256, 257, 70001}) test_quantize_stats(blocks);
  std::printf("%s, %s\n", fastlora_isas(), fastlora_has_threads() ? "threads" : "no threads");
  if (failures() > 0) std::printf("%d failures\n", failures());
  return failures() > 0 ? 1 : 0;
}
