// Products of tokens with adapters, which are narrow: see Tokens in kernels.h.
//
// Included inside the namespace of one instruction set, after product_kernels.h. Bound by reading
// the tokens: rows are read from end to end, once, and packed rows serve both products: they are
// the left operand of one and the right operand of the other, which is why slots are fp32 for every
// dtype.

// `ranks` factors of rows [row, row + rows), the transposed columns from r on.
template <class T>
void pack_factors(
    const Left& factors, int64_t r, int64_t ranks, int64_t row, int64_t rows, float* out) {
  for (int64_t p = 0; p < rows; ++p) {
    const T* factor = static_cast<const T*>(factors.data) + (row + p) * factors.stride + r;
    for (int64_t i = 0; i < ranks; ++i) out[i * kLeftStride + p] = to_float(factor[i]);
  }
}

// All columns of an adapter, rows r rounded up to kUnit apart.
template <class T>
void pack_adapter(const Right& right, Range depth, int64_t r, float* out) {
  const int64_t row = (r + kUnit - 1) / kUnit * kUnit;
  pack_dense<T, Fp32Format>(right, depth.first, depth.last - depth.first, 0, r,
                            out + depth.first * row, row, kSliver);
}

// reduced [r, columns] += factors^T tokens, for packed rows of tokens
template <class T>
void reduce_tokens(const Tokens& t, Range rows, Range columns, const float* packed, float* left) {
  const int64_t count = rows.last - rows.first;
  for_tiles<Fp32Format>(t.r, [&](int64_t r, int64_t ranks) {
    pack_factors<T>(*t.factors, r, ranks, rows.first, count, left);
    for (int64_t k = columns.first; k < columns.last; k += kDepth) {
      const int64_t width = columns.last - k < kDepth ? columns.last - k : kDepth;
      const float* block = packed + (k - columns.first) / kDepth * kTokenRows * kLeftStride;
      multiply_tiles<Fp32Format>(ranks, width, count, left, {block, kLeftStride, kSliver},
                                 t.reduced + r * t.reduced_stride + k, t.reduced_stride);
    }
  });
}

// sums [rows, ranks] += tokens adapter, for packed rows of tokens
inline void project_tokens(
    const Tokens& t, int64_t rows, Range columns, Range ranks, const float* packed, float* sums) {
  const int64_t row = (t.r + kUnit - 1) / kUnit * kUnit;
  for (int64_t k = columns.first; k < columns.last; k += kDepth) {
    const int64_t depth = columns.last - k < kDepth ? columns.last - k : kDepth;
    const float* block = packed + (k - columns.first) / kDepth * kTokenRows * kLeftStride;
    const Panel right{t.adapter + k * row + ranks.first, row, kSliver};
    for_tiles<Fp32Format>(rows, [&](int64_t i, int64_t height) {
      multiply_tiles<Fp32Format>(height, ranks.last - ranks.first, depth, block + i * kLeftStride,
                                 right, sums + i * kBlockColumns, kBlockColumns);
    });
  }
}

template <class T>
void pack_tokens(const Tokens& t, Range rows, Range columns, float* out) {
  const Philox philox(t.drop == nullptr ? 0 : t.drop->seed);
  T dropped[kDepth];
  for (int64_t row = rows.first; row < rows.last; ++row, out += kLeftStride) {
    const T* x = static_cast<const T*>(t.tokens.data) + row * t.tokens.stride;
    float* to = out;
    for (int64_t k = columns.first; k < columns.last; k += kDepth, to += kTokenRows * kLeftStride) {
      const int64_t width = columns.last - k < kDepth ? columns.last - k : kDepth;
      const T* run = x + k;
      if (t.drop != nullptr) {
        drop_row(philox, *t.drop, row, k, width, run, dropped);
        run = dropped;
      }
      widen(run, width, to);
    }
  }
}

template <class T>
void pass_tokens(const Tokens& t, Range rows, Range columns, float* scratch) {
  float* packed = scratch;
  float* left = packed + kTokenColumns / kDepth * kTokenRows * kLeftStride;
  float* sums = left + kTokenRows * kLeftStride;
  for (int64_t row = rows.first; row < rows.last; row += kTokenRows) {
    const int64_t count = rows.last - row < kTokenRows ? rows.last - row : kTokenRows;
    const Range some_rows{row, row + count};
    // more than kBlockColumns ranks need another pass over these rows
    for (int64_t r = 0; r < t.r; r += kBlockColumns) {
      const Range ranks{r, t.r - r < kBlockColumns ? t.r : r + kBlockColumns};
      memset(sums, 0, count * kBlockColumns * sizeof(float));
      for (int64_t k = columns.first; k < columns.last; k += kTokenColumns) {
        const Range some{k, columns.last - k < kTokenColumns ? columns.last : k + kTokenColumns};
        pack_tokens<T>(t, some_rows, some, packed);
        if (t.factors != nullptr && r == 0) reduce_tokens<T>(t, some_rows, some, packed, left);
        if (t.adapter != nullptr) project_tokens(t, count, some, ranks, packed, sums);
      }
      if (t.adapter == nullptr) break;
      store_sums(sums, count, ranks.last - ranks.first, false,
                 static_cast<T*>(t.out) + row * t.out_stride + r, t.out_stride);
    }
  }
}
