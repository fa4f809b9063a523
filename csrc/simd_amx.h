// Products of pairs in AMX's matrix registers, over simd_avx512bf16.h. Included inside a namespace,
// after tile_kernels.h.
//
// A register is a matrix of 16 rows of 64 bytes, or less if so configured: the last slots of a
// depth and the last rows of a block have configurations of their own, so nothing has to be filled
// up. Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).

constexpr int64_t kMatrixRows = 16;

struct MatrixConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int matrix, int64_t height, int64_t slots) {
    rows[matrix] = static_cast<uint8_t>(height);
    row_bytes[matrix] = static_cast<uint16_t>(slots * 4);
  }
};

#if defined(FASTLORA_EMULATE)
// The same sums in the same order on processors without the instructions: for tests.
struct Matrices {
  MatrixConfig config;
  float slots[8][kMatrixRows][16];
};
thread_local Matrices matrices;

inline void configure(const MatrixConfig& config) { matrices.config = config; }
inline void release() { matrices.config = {}; }

template <int kMatrix>
void load_matrix(const float* from, int64_t stride) {
  for (int i = 0; i < matrices.config.rows[kMatrix]; ++i) {
    memcpy(matrices.slots[kMatrix][i], from + i * stride, matrices.config.row_bytes[kMatrix]);
  }
}

template <int kMatrix>
void store_matrix(float* to, int64_t stride) {
  for (int i = 0; i < matrices.config.rows[kMatrix]; ++i) {
    memcpy(to + i * stride, matrices.slots[kMatrix][i], matrices.config.row_bytes[kMatrix]);
  }
}

template <int kSums, int kLeft, int kRight>
void multiply_matrices() {
  for (int i = 0; i < matrices.config.rows[kSums]; ++i) {
    Vec first = splat(0.0f), second = first;
    for (int k = 0; k < matrices.config.row_bytes[kLeft] / 4; ++k) {
      const Vec x = splat(matrices.slots[kLeft][i][k]), w = load(matrices.slots[kRight][k]);
      first = fma(first_of(x), first_of(w), first);
      second = fma(second_of(x), second_of(w), second);
    }
    float* sums = matrices.slots[kSums][i];
    store(sums, add(load(sums), add(first, second)));
  }
}
#else
// the intrinsics do not say that they read memory
inline void fence() { asm volatile("" ::: "memory"); }

inline void configure(const MatrixConfig& config) {
  fence();
  _tile_loadconfig(&config);
}
inline void release() { _tile_release(); }

// the instructions name their registers: there is a case for each
template <int kMatrix>
void load_matrix(const float* from, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  fence();
  if constexpr (kMatrix == 0) _tile_loadd(0, from, bytes);
  if constexpr (kMatrix == 1) _tile_loadd(1, from, bytes);
  if constexpr (kMatrix == 2) _tile_loadd(2, from, bytes);
  if constexpr (kMatrix == 3) _tile_loadd(3, from, bytes);
  if constexpr (kMatrix == 4) _tile_loadd(4, from, bytes);
  if constexpr (kMatrix == 5) _tile_loadd(5, from, bytes);
  if constexpr (kMatrix == 6) _tile_loadd(6, from, bytes);
  if constexpr (kMatrix == 7) _tile_loadd(7, from, bytes);
}

template <int kMatrix>
void store_matrix(float* to, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  if constexpr (kMatrix == 0) _tile_stored(0, to, bytes);
  if constexpr (kMatrix == 1) _tile_stored(1, to, bytes);
  if constexpr (kMatrix == 2) _tile_stored(2, to, bytes);
  if constexpr (kMatrix == 3) _tile_stored(3, to, bytes);
}

template <int kSums, int kLeft, int kRight>
void multiply_matrices() {
  if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
}
#endif

struct MatrixFormat : PairFormat {
  static constexpr int kRows = 2 * kMatrixRows;
};

// Sums are matrices 0 and 1, and 2 and 3 below them if there is a second row; 4 and 5 are the left
// operand, 6 and 7 the right one. `slots` of the depth are multiplied at once.
template <bool kTwo>
void multiply_in_matrices(int64_t rows,
                          int64_t columns,
                          int64_t depth,
                          int64_t slots,
                          const float* left,
                          const Panel& right,
                          float* c,
                          int64_t stride) {
  const int64_t upper = kTwo ? (rows + 1) / 2 : rows, lower = rows - upper;
  MatrixConfig config;
  for (int half = 0; half < 2; ++half) {
    config.set(half, upper, 16);
    config.set(6 + half, slots, 16);
    if (kTwo) config.set(2 + half, lower, 16);
  }
  config.set(4, upper, slots);
  if (kTwo) config.set(5, lower, slots);
  configure(config);
  const float* sliver = right.data;
  for (int64_t j = 0; j < columns; j += kSliver, sliver += right.sliver) {
    float* above = c + j;
    float* below = above + upper * stride;
    load_matrix<0>(above, stride);
    load_matrix<1>(above + kWidth, stride);
    if constexpr (kTwo) load_matrix<2>(below, stride);
    if constexpr (kTwo) load_matrix<3>(below + kWidth, stride);
    for (int64_t k = 0; k < depth; k += slots) {
      load_matrix<6>(sliver + k * right.row, right.row);
      load_matrix<7>(sliver + k * right.row + kWidth, right.row);
      load_matrix<4>(left + k, kLeftStride);
      multiply_matrices<0, 4, 6>();
      multiply_matrices<1, 4, 7>();
      if constexpr (kTwo) load_matrix<5>(left + upper * kLeftStride + k, kLeftStride);
      if constexpr (kTwo) multiply_matrices<2, 5, 6>();
      if constexpr (kTwo) multiply_matrices<3, 5, 7>();
    }
    store_matrix<0>(above, stride);
    store_matrix<1>(above + kWidth, stride);
    if constexpr (kTwo) store_matrix<2>(below, stride);
    if constexpr (kTwo) store_matrix<3>(below + kWidth, stride);
  }
  release();
}

// Also for few rows: vectors would add the same products in another order, and how many rows a tile
// has depends on the number of threads.
template <>
inline void multiply_tiles<MatrixFormat>(int64_t rows,
                                         int64_t columns,
                                         int64_t depth,
                                         const float* left,
                                         const Panel& right,
                                         float* c,
                                         int64_t stride) {
  const auto multiply =
      rows > kMatrixRows ? multiply_in_matrices<true> : multiply_in_matrices<false>;
  const int64_t rest = depth % 16, whole = depth - rest;
  if (whole > 0) multiply(rows, columns, whole, 16, left, right, c, stride);
  if (rest > 0) {
    const Panel last{right.data + whole * right.row, right.row, right.sliver};
    multiply(rows, columns, rest, rest, left + whole, last, c, stride);
  }
}
