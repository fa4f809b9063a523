// Products of one or two rows with a packed weight, which take less time than decoding it: a
// decoded number is used in its register.
//
// Included inside the namespace of one instruction set, after panel_kernels.h. For weights whose
// rows are whole chunks. Packed runs of the left operand lie as they were, so they are read as
// Numbers.

constexpr int64_t kFewRows = 2;

inline float sum_of(Vec x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The first run of the left operand's rows; the next one is term.packed_rows rows further.
template <class Format>
const typename Format::Number* first_run(const Term& term, const Block& block) {
  const float* run = term.packed + block.packed_row * kLeftStride;
  return reinterpret_cast<const typename Format::Number*>(run);
}

// Rows of the weight are columns of the result: sums along them, kChunk numbers of one scale at
// once.
template <class T, class Format, int kRows, int64_t kChunk>
void add_few_columns(const Term& term, const Block& block, float* sums) {
  constexpr int64_t kApart = kLeftStride * Format::kPerSlot;
  const Nf4 w = *term.right.weight;
  for (int64_t j = 0; j < block.columns; ++j) {
    Vec parts[kRows][2];
    for (auto& part : parts) part[0] = part[1] = splat(0.0f);
    const auto* x = first_run<Format>(term, block);
    for (int64_t k = 0; k < term.depth; k += term.step, x += term.packed_rows * kApart) {
      const int64_t depth = term.depth - k < term.step ? term.depth - k : term.step;
      for (int64_t p = 0; p < depth; p += kChunk) {
        const int64_t at = (block.column + j) * w.k + k + p;
        const auto decode = decoder_at<T, float>(w, at);
        float chunk[kChunk];
        for (int64_t i = 0; i < kChunk; i += kStep) {
          decode(w.blocks.packed + (at + i) / 2, chunk + i);
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kChunk / kWidth; ++i) {
          const Vec values = load(chunk + i * kWidth);
#pragma GCC unroll 2
          for (int m = 0; m < kRows; ++m) {
            Vec& part = parts[m][i % 2];
            part = fma(load(x + m * kApart + p + i * kWidth), values, part);
          }
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
      sums[m * kBlockColumns + j] += sum_of(add(parts[m][0], parts[m][1]));
    }
  }
}

// Rows of the weight are added up: kSpan columns of the result stay in registers.
template <class T, class Format, int kRows, int64_t kSpan>
void add_few_rows(const Term& term, const Block& block, int64_t column, float* sums) {
  constexpr int64_t kApart = kLeftStride * Format::kPerSlot, kVecs = kSpan / kWidth;
  const Nf4 w = *term.right.weight;
  Vec parts[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int64_t i = 0; i < kVecs; ++i) {
      parts[m][i] = load(sums + m * kBlockColumns + column + i * kWidth);
    }
  }
  const auto* x = first_run<Format>(term, block);
  for (int64_t k = 0; k < term.depth; k += term.step, x += term.packed_rows * kApart) {
    const int64_t depth = term.depth - k < term.step ? term.depth - k : term.step;
    for (int64_t p = 0; p < depth; ++p) {
      const int64_t start = (k + p) * w.k + block.column + column;
      if (k + p + kRowsAhead < w.n) {
        prefetch(w.blocks.packed + (start + kRowsAhead * w.k) / 2, kSpan / 2);
      }
      Vec factors[kRows];
      for (int m = 0; m < kRows; ++m) factors[m] = splat(to_float(x[m * kApart + p]));
#pragma GCC unroll 4
      for (int64_t j = 0; j < kSpan; j += kStep) {
        float chunk[kStep];
        decoder_at<T, float>(w, start + j)(w.blocks.packed + (start + j) / 2, chunk);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kStep / kWidth; ++i) {
          const Vec values = load(chunk + i * kWidth);
#pragma GCC unroll 2
          for (int m = 0; m < kRows; ++m) {
            Vec& part = parts[m][j / kWidth + i];
            part = fma(factors[m], values, part);
          }
        }
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int64_t i = 0; i < kVecs; ++i) {
      store(sums + m * kBlockColumns + column + i * kWidth, parts[m][i]);
    }
  }
}

template <class T, class Format, int kRows>
void add_few_of(const Term& term, const Block& block, float* sums) {
  if (term.right.form == Right::kNf4Columns) {
    const Nf4& w = *term.right.weight;
    const bool wide =
        w.k % (2 * kStep) == 0 && term.step % (2 * kStep) == 0 && w.blocks.blocksize >= 2 * kStep;
    return wide ? add_few_columns<T, Format, kRows, 2 * kStep>(term, block, sums)
                : add_few_columns<T, Format, kRows, kStep>(term, block, sums);
  }
  constexpr int64_t kSpan = 8 * kWidth < kStep ? kStep : 8 * kWidth;
  int64_t j = 0;
  for (; j + kSpan <= block.columns; j += kSpan) {
    add_few_rows<T, Format, kRows, kSpan>(term, block, j, sums);
  }
  for (; j < block.columns; j += kStep) {
    add_few_rows<T, Format, kRows, kStep>(term, block, j, sums);
  }
}

// What add_term does for the terms that `is_few` names.
template <class T, class Format>
void add_few(const Term& term, const Block& block, float* sums) {
  if (block.rows == 1) {
    add_few_of<T, Format, 1>(term, block, sums);
  } else {
    add_few_of<T, Format, 2>(term, block, sums);
  }
}

// By the rows of the whole call, so that the result does not depend on how it was cut.
inline bool is_few(const Term& term) {
  return term.packed_rows <= kFewRows && term.right.weight != nullptr &&
         in_chunks(*term.right.weight);
}
