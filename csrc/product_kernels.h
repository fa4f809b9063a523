// Products of activations with packed weights and adapters: see Product in kernels.h.
//
// Included inside the namespace of one instruction set, after panel_kernels.h and few_kernels.h.
// A panel of the right operand is made once and stays in the second cache while tiles of the left
// one pass through the first. Results do not depend on how the work was cut.

// Adds a term to the sums; calls start(row, rows) and finish(row, rows) around the last tile of
// rows.
template <class T, class Format, class Start, class Finish>
void add_term(const Term& term,
              const Block& block,
              float* sums,
              float* panel,
              const Start& start,
              const Finish& finish) {
  if (is_few(term)) {
    start(0, block.rows);
    add_few<T, Format>(term, block, sums);
    finish(0, block.rows);
    return;
  }
  for (int64_t k = 0; k < term.depth; k += term.step) {
    const bool last = term.depth - k <= term.step;
    const int64_t depth = last ? term.depth - k : term.step;
    const int64_t slots = (depth + Format::kPerSlot - 1) / Format::kPerSlot;
    const Panel right =
        pack_right<T, Format>(term.right, k, depth, block.column, block.columns, panel);
    const float* left =
        term.packed + (k / term.step * term.packed_rows + block.packed_row) * kLeftStride;
    for_tiles<Format>(block.rows, [&](int64_t row, int64_t rows) {
      if (last) start(row, rows);
      multiply_tiles<Format>(rows, block.columns, slots, left + row * kLeftStride, right,
                             sums + row * kBlockColumns, kBlockColumns);
      if (last) finish(row, rows);
    });
  }
}

inline void mask_rows(
    const Mask& mask, const Block& block, int64_t row, int64_t rows, float* sums) {
  const Philox philox(mask.seed);
  for (int64_t i = row; i < row + rows; ++i) {
    float* some = sums + i * kBlockColumns;
    drop_row(philox, mask, block.row + i, block.column, block.columns, some, some);
  }
}

template <class Out>
void store_row(const float* sums, int64_t count, bool accumulate, Out* out) {
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) {
    const Vec sum = load(sums + j);
    store(out + j, accumulate ? add(sum, load(out + j)) : sum);
  }
  for (; j < count; ++j) {
    from_float(accumulate ? sums[j] + to_float(out[j]) : sums[j], out + j);
  }
}

template <class Out>
void store_sums(
    const float* sums, int64_t rows, int64_t columns, bool accumulate, Out* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    store_row(sums + i * kBlockColumns, columns, accumulate, out + i * stride);
  }
}

// Sums start with the bias, or at zero.
template <class T>
void start_sums(const T* bias, int64_t rows, int64_t columns, float* sums) {
  float row[kBlockColumns] = {};
  if (bias != nullptr) widen(bias, columns, row);
  for (int64_t i = 0; i < rows; ++i) memcpy(sums + i * kBlockColumns, row, sizeof(row));
}

template <class T, class Format>
void multiply_block(const Product& p, const Block& block, float* scratch) {
  float* sums = scratch;
  float* panel = sums + kBlockRows * kBlockColumns;
  const T* bias = static_cast<const T*>(p.bias);
  start_sums(bias == nullptr ? bias : bias + block.column, block.rows, block.columns, sums);
  T* out = static_cast<T*>(p.out) + block.row * p.out_stride + block.column;
  const auto nothing = [](int64_t, int64_t) {};
  // lines of the output come from memory while the tile before them is computed
  const auto fetch = [&](int64_t row, int64_t rows) {
    for (int64_t i = row; i < row + rows; ++i) {
      prefetch_for_write(out + i * p.out_stride, block.columns * static_cast<int64_t>(sizeof(T)));
    }
  };
  const auto write = [&](int64_t row, int64_t rows) {
    store_sums(sums + row * kBlockColumns, rows, block.columns, p.accumulate,
               out + row * p.out_stride, p.out_stride);
  };
  if (p.lora.depth > 0) {
    add_term<T, Format>(p.lora, block, sums, panel, nothing, [&](int64_t row, int64_t rows) {
      if (p.mask != nullptr) mask_rows(*p.mask, block, row, rows, sums);
      if (p.count == 0) write(row, rows);
    });
  }
  for (int64_t i = 0; i < p.count; ++i) {
    if (i + 1 < p.count) {
      add_term<T, Format>(p.terms[i], block, sums, panel, nothing, nothing);
    } else {
      add_term<T, Format>(p.terms[i], block, sums, panel, fetch, write);
    }
  }
}
