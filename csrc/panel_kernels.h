// Operands of a product in the layout that the micro-kernel wants: see tile_kernels.h.
//
// Included inside the namespace of one instruction set, after its simd_*.h, which defines beside
// what tile_kernels.h needs:
//   load(const T*), store(T*, Vec)   kWidth numbers from and to a dtype, rounded to nearest even
//   rounded<T>(Vec)                  rounded to a dtype
//   Words, load_words(rows, at, w)   kWidth words of 32 bits: word i of row j, from byte `at` on,
//                                    is lane j of w[i], for four i
//   as_floats(Words)                 the same bits
//   Lookup(code), (words, shift)     the values of the four bits of each lane from bit `shift` on
//   Decoder<float>(code, a, tag)     as in nf4_kernels.h, its values rounded to the tag's dtype
//
// A Format with two numbers of the depth in a slot defines beside what tile_kernels.h says:
//   pack_run(in, count, out)         a run of the depth to slots, zeros after an odd count
//   pack_rows(first, second, count, out)  two runs side by side: a number of each in every slot
//   pack(first, second)              the same of registers of decoded weights, rounded

template <class T>
void widen(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

// --- left ------------------------------------------------------------------------------------

template <class Format, class T>
void pack_run(const T* in, int64_t count, float* out) {
  if constexpr (Format::kPerSlot == 1) {
    widen(in, count, out);
  } else {
    Format::pack_run(in, count, out);
  }
}

template <class T, class Format>
void pack_left(const void* row, int64_t first, int64_t count, float* out) {
  pack_run<Format>(static_cast<const T*>(row) + first, count, out);
}

// --- right, dense ----------------------------------------------------------------------------

template <class T>
void scale_run(const T* in, int64_t count, float scale, T* out) {
  for (int64_t i = 0; i < count; ++i) from_float(to_float(in[i]) * scale, out + i);
}

// Columns that are transposed at once.
constexpr int64_t kChunk = 64;

// A run of at most kChunk numbers of the depth, scaled, to slots.
template <class Format, class T>
void pack_scaled(const T* in, int64_t count, float scale, float* out) {
  if constexpr (Format::kPerSlot == 1) {
    widen(in, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
  } else {
    T scaled[kChunk];
    scale_run(in, count, scale, scaled);
    Format::pack_run(scaled, count, out);
  }
}

// One row of slots, cut into slivers, of the rows from `row` on; columns past the end are zeros.
template <class Format, class T>
void pack_row(const T* row,
              int64_t stride,
              int64_t rows,
              int64_t columns,
              float scale,
              float* out,
              int64_t sliver) {
  for (int64_t j = 0; j < columns; j += kSliver, out += sliver) {
    const int64_t count = columns - j < kSliver ? columns - j : kSliver;
    memset(out, 0, kSliver * sizeof(float));
    if constexpr (Format::kPerSlot == 1) {
      pack_scaled<Format>(row + j, count, scale, out);
    } else {
      T scaled[2][kSliver] = {};
      for (int64_t i = 0; i < rows && i < 2; ++i) {
        scale_run(row + i * stride + j, count, scale, scaled[i]);
      }
      Format::pack_rows(scaled[0], scaled[1], kSliver, out);
    }
  }
}

// Columns of the panel are rows in memory: kWidth of them are transposed, a few slots at a time.
template <class T, class Format>
void pack_lanes(const T* from,
                int64_t stride,
                int64_t lanes,
                int64_t depth,
                float scale,
                float* out,
                int64_t row) {
  constexpr int64_t kStride = kChunk / Format::kPerSlot;
  float slots[kWidth][kStride] = {};
  const uint8_t* rows[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) rows[i] = reinterpret_cast<const uint8_t*>(slots[i]);
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = depth - k < kChunk ? depth - k : kChunk;
    const int64_t filled = (count + Format::kPerSlot - 1) / Format::kPerSlot;
    for (int64_t i = 0; i < lanes; ++i) {
      pack_scaled<Format>(from + i * stride + k, count, scale, slots[i]);
    }
    float* to = out + k / Format::kPerSlot * row;
    for (int64_t p = 0; p < filled; p += 4) {
      Words words[4];
      load_words(rows, p * static_cast<int64_t>(sizeof(float)), words);
      for (int64_t i = 0; i < 4 && p + i < filled; ++i) {
        store(to + (p + i) * row, as_floats(words[i]));
      }
    }
  }
}

// Slivers `sliver` apart, rows of slots `row` apart.
template <class T, class Format>
void pack_dense(const Right& right,
                int64_t k,
                int64_t depth,
                int64_t column,
                int64_t columns,
                float* out,
                int64_t row,
                int64_t sliver) {
  const T* data = static_cast<const T*>(right.data);
  if (right.form == Right::kRows) {
    const T* from = data + k * right.stride + column;
    for (int64_t i = 0; i < depth; i += Format::kPerSlot) {
      pack_row<Format>(from + i * right.stride, right.stride, depth - i, columns, right.scale,
                       out + i / Format::kPerSlot * row, sliver);
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kWidth) {
    const int64_t lanes = columns - j < kWidth ? columns - j : kWidth;
    pack_lanes<T, Format>(data + (column + j) * right.stride + k, right.stride, lanes, depth,
                          right.scale, out + j / kSliver * sliver + j % kSliver, row);
  }
}

// --- right, packed weights -------------------------------------------------------------------

// Vectors need every row to start at a whole byte of a whole chunk.
inline bool in_chunks(const Nf4& w) { return w.k % kStep == 0; }

template <class T>
T weight_at(const Nf4& w, int64_t n, int64_t k) {
  const int64_t i = n * w.k + k;
  const int code = w.blocks.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
  T value;
  from_float(w.blocks.code[code] * block_scale(w.blocks, i >> w.block_shift), &value);
  return value;
}

// Elements one by one, for shapes whose rows are no whole chunks.
template <class T, class Format>
void decode_any(const Nf4& w,
                bool transposed,
                int64_t k,
                int64_t depth,
                int64_t column,
                int64_t columns,
                float* out) {
  for (int64_t j = 0; j < columns; ++j) {
    float* to = out + j / kSliver * kSliver * kDepth + j % kSliver;
    T run[kDepth * Format::kPerSlot];
    float slots[kDepth];
    for (int64_t p = 0; p < depth; ++p) {
      run[p] = transposed ? weight_at<T>(w, column + j, k + p) : weight_at<T>(w, k + p, column + j);
    }
    pack_run<Format>(run, depth, slots);
    for (int64_t p = 0; p * Format::kPerSlot < depth; ++p) to[p * kSliver] = slots[p];
  }
}

// Of the block that element `at` is in; values that were rounded to T.
template <class T, class Out>
Decoder<Out> decoder_at(const Nf4& w, int64_t at) {
  return Decoder<Out>(w.blocks.code, block_scale(w.blocks, at >> w.block_shift),
                      static_cast<const T*>(nullptr));
}

// Columns [k, k + columns) of row n of the weight: chunks of 32 neighbours are decoded at once.
template <class T, class Out>
void decode_row(const Nf4& w, int64_t n, int64_t k, int64_t columns, Out* out, int64_t sliver) {
  for (int64_t j = 0; j < columns; j += kStep) {
    const int64_t at = n * w.k + k + j;
    const uint8_t* packed = w.blocks.packed + at / 2;
    const auto decode = decoder_at<T, Out>(w, at);
    Out* to = out + j / kSliver * sliver + j % kSliver;
    if (kSliver >= kStep || sliver == kSliver) {
      decode(packed, to);
    } else {
      Out chunk[kStep];
      decode(packed, chunk);
      for (int64_t part = 0; part < kStep; part += kSliver, to += sliver) {
        memcpy(to, chunk + part, kSliver * sizeof(Out));
      }
    }
  }
}

constexpr int64_t kRowsAhead = 16;

// Rows of the weight are rows of the panel.
template <class T, class Format>
void decode_rows(
    const Nf4& weight, int64_t n, int64_t depth, int64_t k, int64_t columns, float* out) {
  const Nf4 w = weight;  // a copy, which what is written cannot alias
  for (int64_t i = 0; i < depth; ++i) {
    // a short piece of every row: too short for the processor to read ahead
    const int64_t ahead = n + i + kRowsAhead;
    if (ahead < w.n) prefetch(w.blocks.packed + (ahead * w.k + k) / 2, columns / 2);
    if constexpr (Format::kPerSlot == 1) {
      decode_row<T>(w, n + i, k, columns, out + i * kSliver, kSliver * kDepth);
    } else if (i % 2 == 0) {
      T rows[2][kBlockColumns] = {};
      decode_row<T>(w, n + i, k, columns, rows[0], kSliver);
      if (i + 1 < depth) decode_row<T>(w, n + i + 1, k, columns, rows[1], kSliver);
      for (int64_t j = 0; j < columns; j += kSliver) {
        Format::pack_rows(rows[0] + j, rows[1] + j, kSliver, out + j * kDepth + i / 2 * kSliver);
      }
    }
  }
}

// Rows of the weight are columns of the panel: lane j of a vector is row j, so that nothing has to
// be transposed but words of eight codes.
template <class T, class Format>
void decode_lanes(const Nf4& w, int64_t n, int64_t k, int64_t depth, float* out) {
  const DequantizeBlocks d = w.blocks;
  const Lookup lookup(d.code);
  const uint8_t* rows[kWidth];
  int64_t starts[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) {
    // lanes past the end repeat the last row, nobody reads them
    starts[i] = (n + i < w.n ? n + i : w.n - 1) * w.k + k;
    rows[i] = d.packed + starts[i] / 2;
  }
  // all rows change their block at the same columns, or any row may at any chunk
  const int64_t step = w.k % d.blocksize == 0 ? d.blocksize : kStep;
  const int64_t left = w.k - k - depth;  // columns of the panels to come
  for (const uint8_t* row : rows) prefetch(row + depth / 2, (left < depth ? left : depth) / 2);
  const int shift = w.block_shift;
  float scales[kWidth] = {};
  for (int64_t p = 0; p < depth; p += kStep) {
    if (p == 0 || (k + p) % step == 0) {
      for (int64_t i = 0; i < kWidth; ++i) scales[i] = block_scale(d, (starts[i] + p) >> shift);
    }
    const Vec scale = load(scales);
    Words words[4];
    load_words(rows, p / 2, words);
    float* to = out + p / Format::kPerSlot * kSliver;
#pragma GCC unroll 4
    for (const Words& word : words) {
#pragma GCC unroll 4
      for (int byte = 0; byte < 32; byte += 8) {
        // high nibble first
        const Vec even = multiply(lookup(word, byte + 4), scale);
        const Vec odd = multiply(lookup(word, byte), scale);
        if constexpr (Format::kPerSlot == 1) {
          store(to, rounded<T>(even));
          store(to + kSliver, rounded<T>(odd));
        } else {
          store(to, Format::pack(even, odd));
        }
        to += 2 / Format::kPerSlot * kSliver;
      }
    }
  }
}

template <class T, class Format>
void decode_columns(
    const Nf4& w, int64_t k, int64_t depth, int64_t n, int64_t columns, float* out) {
  for (int64_t j = 0; j < columns; j += kSliver, out += kSliver * kDepth) {
    decode_lanes<T, Format>(w, n + j, k, depth, out);
    if (columns - j > kWidth) decode_lanes<T, Format>(w, n + j + kWidth, k, depth, out + kWidth);
  }
}

template <class T, class Format>
Panel pack_right(
    const Right& right, int64_t k, int64_t depth, int64_t column, int64_t columns, float* out) {
  constexpr int64_t kApart = kSliver * kDepth;
  if (right.weight == nullptr) {
    pack_dense<T, Format>(right, k, depth, column, columns, out, kSliver, kApart);
  } else if (!in_chunks(*right.weight)) {
    const bool transposed = right.form == Right::kNf4Columns;
    decode_any<T, Format>(*right.weight, transposed, k, depth, column, columns, out);
  } else if (right.form == Right::kNf4Columns) {
    decode_columns<T, Format>(*right.weight, k, depth, column, columns, out);
  } else {
    decode_rows<T, Format>(*right.weight, k, depth, column, columns, out);
  }
  return {out, kSliver, kApart};
}
