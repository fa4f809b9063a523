// Steps of the optimizer, and what plain formulas give, in the same bytes.
#ifndef FASTLORA_TESTS_ADAMW_H_
#define FASTLORA_TESTS_ADAMW_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "everywhere.h"
#include "values.h"

// A type of 8-bit numbers as fastlora.codebooks makes it: decades of equal intervals, zero and one.
class CodeTables {
 public:
  explicit CodeTables(bool is_signed)
      : values_(values_of(is_signed)),
        midpoints_(midpoints_of(values_)),
        guess_(guesses()),
        abi_{values_.get(), midpoints_.get(), guess_.get()} {}

  const fastlora_codes& abi() const { return abi_; }
  float value(uint8_t code) const { return values_[code]; }

  uint8_t code(float x) const {
    return static_cast<uint8_t>(std::lower_bound(midpoints_.get(), midpoints_.get() + 255, x) -
                                midpoints_.get());
  }

 private:
  static std::vector<float> values_of(bool is_signed) {
    std::vector<float> values = {0.0f, 1.0f};
    for (int decade = 0; decade < 7; ++decade) {
      const int count = (is_signed ? 1 : 2) << decade;
      for (int i = 0; i < count; ++i) {
        const double centre = 0.1 + 0.9 * (i + 0.5) / count;
        values.push_back(static_cast<float>(std::pow(10.0, decade - 6) * centre));
        if (is_signed) values.push_back(-values.back());
      }
    }
    std::sort(values.begin(), values.end());
    return values;
  }
  static std::vector<float> midpoints_of(const Array<float>& values) {
    std::vector<float> midpoints;
    for (int i = 0; i < 255; ++i) {
      midpoints.push_back(static_cast<float>((double{values[i]} + values[i + 1]) / 2));
    }
    return midpoints;
  }
  std::vector<uint8_t> guesses() const {
    std::vector<uint8_t> guesses;
    for (uint32_t upper = 0; upper < 65536; ++upper) {
      // the lowest number with these bits
      const uint32_t bits = upper << 16 | (upper >> 15 ? 0xffff : 0);
      float x = 0;
      std::memcpy(&x, &bits, sizeof(x));
      guesses.push_back(std::min<uint8_t>(code(std::isnan(x) ? 0 : x), 254));
    }
    return guesses;
  }

  Array<float> values_, midpoints_;
  Array<uint8_t> guess_;
  fastlora_codes abi_;
};

// A step over a span of some parameters, the third without a gradient.
class AdamW {
 public:
  AdamW(const std::vector<int64_t>& sizes, int64_t first, int64_t numel, int dtype)
      : first_(first), numel_(numel), dtype_(dtype), starts_(starts_of(sizes)) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      params_.emplace_back(1, sizes[i], 0, dtype, random_);
      grads_.emplace_back(1, sizes[i], 0, dtype, random_);
      pointers_.push_back(i == 2 ? nullptr : grads_.back().data());
      rows_.push_back(i % 2);
    }
  }

  void test32() {
    std::vector<float> m(numel_, 0.25f), v(numel_, 0.5f);
    const Values m_before(m.begin(), m.end()), v_before(v.begin(), v.end());
    const auto params = updated(&m, &v);
    everywhere("adamw32 " + std::to_string(numel_), [&](int threads) {
      Output m_out("m", 1, numel_, sizeof(float)), v_out("v", 1, numel_, sizeof(float));
      m_out.set(m_before, FASTLORA_FP32);
      v_out.set(v_before, FASTLORA_FP32);
      expect_params(params, [&](const fastlora_step& step) {
        fastlora_adamw32(&step, first_, numel_, reinterpret_cast<float*>(m_out.data()),
                         reinterpret_cast<float*>(v_out.data()), threads);
      });
      m_out.expect_bytes(encoded({m.begin(), m.end()}, FASTLORA_FP32));
      v_out.expect_bytes(encoded({v.begin(), v.end()}, FASTLORA_FP32));
    });
  }

  void test8(const CodeTables& m_tables, const CodeTables& v_tables) {
    const int64_t blocks = ceil_div(numel_, 256);
    std::vector<uint8_t> m_codes(numel_), v_codes(numel_);
    std::vector<float> m(numel_), v(numel_);
    for (int64_t i = 0; i < numel_; ++i) {
      m[i] = m_tables.value(m_codes[i] = static_cast<uint8_t>(random_() >> 8)) * 0.5f;
      v[i] = v_tables.value(v_codes[i] = static_cast<uint8_t>(random_() >> 8)) * 0.5f;
    }
    const Values m_before(m_codes.begin(), m_codes.end()), v_before(v_codes.begin(), v_codes.end());
    const auto params = updated(&m, &v);
    Values m_scales = encode_blocks(m_tables, m, &m_codes);
    Values v_scales = encode_blocks(v_tables, v, &v_codes);
    for (int64_t i = 0; i < numel_; ++i) v_codes[i] = std::max<uint8_t>(v_codes[i], v[i] > 0);
    for (int64_t block = 0; block < blocks; ++block) {
      if (is_updated(block)) continue;
      m_scales[block] = v_scales[block] = 0.5;
      for (int64_t i = block * 256; i < std::min(numel_, (block + 1) * 256); ++i) {
        m_codes[i] = static_cast<uint8_t>(m_before[i]);
        v_codes[i] = static_cast<uint8_t>(v_before[i]);
      }
    }
    everywhere("adamw8 " + std::to_string(numel_), [&](int threads) {
      Output m_out("m", 1, numel_, 1), v_out("v", 1, numel_, 1);
      Output m_scale("m_scale", 1, blocks, 4), v_scale("v_scale", 1, blocks, 4);
      std::copy(m_before.begin(), m_before.end(), m_out.data());
      std::copy(v_before.begin(), v_before.end(), v_out.data());
      m_scale.set(Values(blocks, 0.5), FASTLORA_FP32);
      v_scale.set(Values(blocks, 0.5), FASTLORA_FP32);
      expect_params(params, [&](const fastlora_step& step) {
        fastlora_adamw8(&step, first_, numel_, m_out.data(), v_out.data(),
                        reinterpret_cast<float*>(m_scale.data()),
                        reinterpret_cast<float*>(v_scale.data()), &m_tables.abi(), &v_tables.abi(),
                        threads);
      });
      m_out.expect_bytes(m_codes);
      v_out.expect_bytes(v_codes);
      m_scale.expect_bytes(encoded(m_scales, FASTLORA_FP32));
      v_scale.expect_bytes(encoded(v_scales, FASTLORA_FP32));
    });
  }

 private:
  static std::vector<int64_t> starts_of(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> starts = {0};
    for (int64_t size : sizes) starts.push_back(starts.back() + size);
    return starts;
  }

  // Whether a parameter with a gradient has elements in a block of the span.
  bool is_updated(int64_t block) const {
    const int64_t first = first_ + block * 256;
    const int64_t last = std::min(first + 256, first_ + numel_);
    for (size_t p = 0; p < params_.size(); ++p) {
      const bool meets = starts_[p] < last && starts_[p + 1] > first;
      if (pointers_[p] != nullptr && meets && starts_[p] < starts_[p + 1]) return true;
    }
    return false;
  }

  static Values encode_blocks(const CodeTables& tables,
                              const std::vector<float>& numbers,
                              std::vector<uint8_t>* codes) {
    Values scales(ceil_div(static_cast<int64_t>(numbers.size()), 256));
    for (size_t i = 0; i < numbers.size(); ++i) {
      scales[i / 256] = std::max<double>(scales[i / 256], std::fabs(numbers[i]));
    }
    for (size_t i = 0; i < numbers.size(); ++i) {
      (*codes)[i] = tables.code(numbers[i] * (1.0f / static_cast<float>(scales[i / 256])));
    }
    return scales;
  }

  // The parameters after the step, whose moments are updated.
  std::vector<Values> updated(std::vector<float>* moments_m, std::vector<float>* moments_v) const {
    std::vector<Values> params;
    for (size_t p = 0; p < params_.size(); ++p) {
      params.push_back(params_[p].values());
      const float* h = kHypers + 8 * rows_[p];
      for (int64_t i = 0; i < static_cast<int64_t>(params[p].size()); ++i) {
        const int64_t place = starts_[p] + i - first_;
        if (pointers_[p] == nullptr || place < 0 || place >= numel_) continue;
        float &m = (*moments_m)[place], &v = (*moments_v)[place];
        const float w = static_cast<float>(params[p][i]);
        const float g = static_cast<float>(grads_[p](0, i)) * h[7];
        m = m + h[4] * (g - m);
        v = h[5] * v + (h[6] * g) * g;
        params[p][i] = rounded(w * h[0] - h[1] * (m / (std::sqrt(v) * h[2] + h[3])), dtype_);
      }
    }
    return params;
  }

  // Asserts that a step makes these parameters of those there are.
  void expect_params(const std::vector<Values>& exact,
                     const std::function<void(const fastlora_step&)>& body) const {
    std::vector<Output> outputs;
    std::vector<void*> pointers;
    for (const Matrix& param : params_) {
      outputs.emplace_back("w", 1, param.values().size(), kItemSize[dtype_]);
      outputs.back().set(param.values(), dtype_);
    }
    for (Output& output : outputs) pointers.push_back(output.data());
    const Array<void*> params(pointers);
    const Array<const void*> grads(pointers_);
    const Array<int64_t> starts(starts_), rows(rows_);
    const Array<float> hypers({kHypers, kHypers + 16});
    const int64_t count = static_cast<int64_t>(params_.size());
    body({params.get(), grads.get(), starts.get(), rows.get(), hypers.get(), count, dtype_});
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i].expect_bytes(encoded(exact[i], dtype_));
  }

  static constexpr float kHypers[] = {0.999f, 0.01f, 1.5f, 1e-6f, 0.1f, 0.99f, 0.01f, 1.0f,
                                      0.95f,  0.1f,  1.1f, 1e-3f, 0.2f, 0.9f,  0.1f,  -1.0f};

  Random random_;
  int64_t first_, numel_;
  int dtype_;
  std::vector<int64_t> starts_;
  std::deque<Matrix> params_, grads_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> rows_;
};

#endif  // FASTLORA_TESTS_ADAMW_H_
