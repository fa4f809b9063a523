// Numbers, matrices and guarded outputs of the tests, made to be read rather than to be fast.
#ifndef FASTLORA_TESTS_VALUES_H_
#define FASTLORA_TESTS_VALUES_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fastlora.h"

using Values = std::vector<double>;

// --- dtypes ----------------------------------------------------------------------------------

constexpr int kDtypes[] = {FASTLORA_FP32, FASTLORA_FP16, FASTLORA_BF16};
constexpr int64_t kItemSize[] = {4, 2, 2};
constexpr double kFloor[] = {1e-5, 1e-3, 1e-2};  // helpers.FLOOR of the Python tests

// Nearest number of a dtype, ties to even; only fp16 is taken beyond its largest.
inline double rounded(double x, int dtype) {
  constexpr int kDigits[] = {24, 11, 8}, kSmallest[] = {-149, -24, -133};
  int exponent = 0;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - kDigits[dtype], kSmallest[dtype]));
  const double nearest = std::nearbyint(x / unit) * unit;
  const bool overflows = dtype == FASTLORA_FP16 && std::fabs(nearest) >= 65536;
  return overflows ? std::copysign(INFINITY, x) : nearest;
}

// Writes a number that the dtype holds.
inline void encode(double x, int dtype, uint8_t* out) {
  if (dtype == FASTLORA_FP16) {
    // a whole infinity has no exponent
    const double size = std::min(std::fabs(x), 65536.0);
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    // an implicit one, where there is one, adds one to the exponent
    const int bits = static_cast<int>(std::ldexp(size, 10 - exponent)) + ((exponent + 14) << 10);
    const uint16_t half = static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
    std::memcpy(out, &half, sizeof(half));
    return;
  }
  const float number = static_cast<float>(x);
  uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  const uint16_t upper = static_cast<uint16_t>(bits >> 16);
  if (dtype == FASTLORA_FP32) {
    std::memcpy(out, &bits, sizeof(bits));
  } else {
    std::memcpy(out, &upper, sizeof(upper));
  }
}

inline double decode(const uint8_t* in, int dtype) {
  uint16_t half = 0;
  std::memcpy(&half, in, sizeof(half));
  if (dtype == FASTLORA_FP16) {
    const int exponent = half >> 10 & 31, digits = half & 1023;
    if (exponent == 31) return digits ? NAN : (half >> 15 ? -INFINITY : INFINITY);
    const double size =
        exponent == 0 ? std::ldexp(digits, -24) : std::ldexp(digits + 1024, exponent - 25);
    return half >> 15 ? -size : size;
  }
  uint32_t bits = uint32_t{half} << 16;
  if (dtype == FASTLORA_FP32) std::memcpy(&bits, in, sizeof(bits));
  float number = 0;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// --- memory ----------------------------------------------------------------------------------

// Of exactly this size: what is read past the end ends the program.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* get() const { return data_; }

 private:
  uint8_t* data_;
  uint8_t* pages_ = nullptr;
  int64_t size_ = 0;
};

#if defined(__SANITIZE_ADDRESS__)
// the sanitizer also sees what is read before the start, and says where
inline Memory::Memory(int64_t bytes) : data_(static_cast<uint8_t*>(std::malloc(bytes))) {}
inline Memory::~Memory() { std::free(data_); }
#else
// a page that nobody may read follows the last byte
inline Memory::Memory(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t used = (bytes + page - 1) / page * page;
  size_ = used + page;
  void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  pages_ = static_cast<uint8_t*>(memory);
  if (mprotect(pages_ + used, page, PROT_NONE) != 0) std::abort();
  data_ = pages_ + used - bytes;
}
inline Memory::~Memory() { munmap(pages_, size_); }
#endif

template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : memory_(values.size() * sizeof(T)) {
    if (!values.empty()) std::memcpy(memory_.get(), values.data(), values.size() * sizeof(T));
  }
  const T* get() const { return reinterpret_cast<const T*>(memory_.get()); }
  T operator[](int64_t i) const { return get()[i]; }

 private:
  Memory memory_;
};

class Random {
 public:
  uint32_t operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  double between(double low, double high) { return low + (high - low) * ((*this)() / 0x1p32); }

 private:
  uint64_t state_ = 1;
};

// [rows, columns] of a dtype. The memory ends with the last number.
class Matrix {
 public:
  Matrix(const Values& values, int64_t rows, int64_t columns, int64_t padding, int dtype)
      : columns_(columns),
        stride_(columns + padding),
        memory_(rows > 0 ? ((rows - 1) * stride_ + columns) * kItemSize[dtype] : 0),
        values_(values) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      const int64_t place = i / columns * stride_ + i % columns;
      encode(values[i], dtype, memory_.get() + place * kItemSize[dtype]);
    }
  }
  Matrix(int64_t rows, int64_t columns, int64_t padding, int dtype, Random& random)
      : Matrix(some(rows * columns, dtype, random), rows, columns, padding, dtype) {}
  const void* data() const { return memory_.get(); }
  int64_t stride() const { return stride_; }
  const Values& values() const { return values_; }
  double operator()(int64_t i, int64_t j) const { return values_[i * columns_ + j]; }

 private:
  static Values some(int64_t count, int dtype, Random& random) {
    Values values(count);
    for (double& x : values) x = rounded(random.between(-2, 2), dtype);
    return values;
  }

  int64_t columns_, stride_;
  Memory memory_;
  Values values_;
};

// --- outputs ---------------------------------------------------------------------------------

inline int& failures() {
  static int count = 0;
  return count;
}

// What is tested at the moment, for messages.
inline char* context() {
  static char text[200] = "";
  return text;
}

inline void fail(const char* name, const char* why, int64_t at) {
  if (++failures() > 20) return;
  std::printf("%s: %s at element %lld of %s\n", context(), why, static_cast<long long>(at), name);
}

// [rows, columns] between guards, all bytes set: numbers that nobody writes are NaN.
class Output {
 public:
  Output(const char* name, int64_t rows, int64_t columns, int64_t item, int64_t padding = 0)
      : name_(name),
        rows_(rows),
        columns_(columns),
        stride_(columns + padding),
        item_(item),
        size_(rows > 0 ? (rows - 1) * stride_ + columns : 0),
        // aligned to an element and to nothing more
        start_(kGuard + item),
        bytes_(start_ + size_ * item + kGuard, kFill) {}

  uint8_t* data() { return bytes_.data() + start_; }
  int64_t stride() const { return stride_; }

  void set(const Values& values, int dtype) {
    for (size_t i = 0; i < values.size(); ++i) encode(values[i], dtype, data() + i * item_);
  }

  // Asserts that these numbers were written, up to rounding, and nothing else.
  void expect(const Values& exact, int dtype) {
    double largest = 0;
    for (double x : exact) largest = std::max(largest, std::fabs(x));
    for (int64_t i = 0; i < rows_ * columns_; ++i) {
      const double got = decode(data() + place(i) * item_, dtype);
      // false for NaN
      if (!(std::fabs(got - exact[i]) <= kFloor[dtype] * largest)) return fail(name_, "wrong", i);
    }
    expect_guards();
  }

  // Asserts that these bytes were written and nothing else.
  void expect_bytes(const std::vector<uint8_t>& exact) {
    for (int64_t i = 0; i < rows_ * columns_; ++i) {
      if (std::memcmp(data() + place(i) * item_, exact.data() + i * item_, item_) != 0) {
        return fail(name_, "other bytes", i);
      }
    }
    expect_guards();
  }

 private:
  static constexpr int64_t kGuard = 128;
  static constexpr uint8_t kFill = 0xff;

  int64_t place(int64_t i) const { return i / columns_ * stride_ + i % columns_; }

  void expect_guards() {
    const int64_t first = start_, last = start_ + size_ * item_;
    for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()); ++i) {
      const bool inside = i >= first && i < last;
      if (inside && (i - first) / item_ % stride_ < columns_) continue;
      if (bytes_[i] != kFill) return fail(name_, "a write outside", (i - first) / item_);
    }
  }

  const char* name_;
  int64_t rows_, columns_, stride_, item_, size_, start_;
  std::vector<uint8_t> bytes_;
};

inline std::vector<uint8_t> encoded(const Values& values, int dtype) {
  std::vector<uint8_t> bytes(values.size() * kItemSize[dtype]);
  for (size_t i = 0; i < values.size(); ++i) {
    encode(values[i], dtype, bytes.data() + i * kItemSize[dtype]);
  }
  return bytes;
}

#endif  // FASTLORA_TESTS_VALUES_H_
