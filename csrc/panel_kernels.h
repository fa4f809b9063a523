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

template <class T>
void widen(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

// --- left ------------------------------------------------------------------------------------

// Rows kLeftStride apart.
template <class T>
void pack_left(const Left& left, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) {
  const T* data = static_cast<const T*>(left.data);
  if (left.form == Left::kColumns) {
    for (int64_t p = 0; p < depth; ++p) {
      const T* x = data + (k + p) * left.stride + row;
      for (int64_t i = 0; i < rows; ++i) out[i * kLeftStride + p] = to_float(x[i]);
    }
    return;
  }
  const T* x = data + row * left.stride + k;
  if (left.drop == nullptr) {
    for (int64_t i = 0; i < rows; ++i) widen(x + i * left.stride, depth, out + i * kLeftStride);
    return;
  }
  const Philox philox(left.drop->seed);
  T dropped[kDepth];
  for (int64_t i = 0; i < rows; ++i) {
    drop_row(philox, *left.drop, row + i, k, depth, x + i * left.stride, dropped);
    widen(dropped, depth, out + i * kLeftStride);
  }
}

// --- right, dense ----------------------------------------------------------------------------

// One row of a panel, cut into slivers; columns past the end are zeros.
template <class T>
void pack_row(const T* row, int64_t columns, float scale, float* out, int64_t sliver) {
  const Vec factor = splat(scale);
  for (int64_t j = 0; j < columns; j += kSliver, out += sliver) {
    const int64_t count = columns - j < kSliver ? columns - j : kSliver;
    widen(row + j, count, out);
    for (int64_t i = count; i < kSliver; ++i) out[i] = 0;
    for (int64_t i = 0; i < kSliver; i += kWidth) {
      store(out + i, multiply(load(out + i), factor));
    }
  }
}

// Columns of the panel are rows in memory: kWidth of them are transposed, a few numbers at a time.
template <class T>
void pack_lanes(const T* from,
                int64_t stride,
                int64_t lanes,
                int64_t depth,
                float scale,
                float* out,
                int64_t row) {
  constexpr int64_t kChunk = 64;
  const Vec factor = splat(scale);
  float wide[kWidth][kChunk] = {};
  const uint8_t* rows[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) rows[i] = reinterpret_cast<const uint8_t*>(wide[i]);
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t count = depth - k < kChunk ? depth - k : kChunk;
    for (int64_t i = 0; i < lanes; ++i) widen(from + i * stride + k, count, wide[i]);
    for (int64_t p = 0; p < count; p += 4) {
      Words words[4];
      load_words(rows, p * static_cast<int64_t>(sizeof(float)), words);
      for (int64_t i = 0; i < 4 && p + i < count; ++i) {
        store(out + (k + p + i) * row, multiply(as_floats(words[i]), factor));
      }
    }
  }
}

template <class T>
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
    for (int64_t i = 0; i < depth; ++i) {
      pack_row(from + i * right.stride, columns, right.scale, out + i * row, sliver);
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kWidth) {
    const int64_t lanes = columns - j < kWidth ? columns - j : kWidth;
    pack_lanes(data + (column + j) * right.stride + k, right.stride, lanes, depth, right.scale,
               out + j / kSliver * sliver + j % kSliver, row);
  }
}

// All columns of an adapter, rows r rounded up to kUnit apart.
template <class T>
void pack_adapter(const Right& right, Range depth, int64_t r, float* out) {
  const int64_t row = (r + kUnit - 1) / kUnit * kUnit;
  pack_dense<T>(right, depth.first, depth.last - depth.first, 0, r, out + depth.first * row, row,
                kSliver);
}

// --- right, packed weights -------------------------------------------------------------------

// Vectors need every row to start at a whole byte of a whole chunk.
inline bool in_chunks(const Nf4& w) { return w.k % kStep == 0; }

template <class T>
float weight_at(const Nf4& w, int64_t n, int64_t k) {
  const int64_t i = n * w.k + k;
  const int code = w.blocks.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
  T value;
  from_float(w.blocks.code[code] * block_scale(w.blocks, i >> w.block_shift), &value);
  return to_float(value);
}

// Elements one by one, for shapes whose rows are no whole chunks.
template <class T>
void decode_any(const Nf4& w,
                bool transposed,
                int64_t k,
                int64_t depth,
                int64_t column,
                int64_t columns,
                float* out) {
  for (int64_t j = 0; j < columns; ++j) {
    float* to = out + j / kSliver * kSliver * kDepth + j % kSliver;
    for (int64_t p = 0; p < depth; ++p) {
      to[p * kSliver] =
          transposed ? weight_at<T>(w, column + j, k + p) : weight_at<T>(w, k + p, column + j);
    }
  }
}

constexpr int64_t kRowsAhead = 16;

// Rows of the weight are rows of the panel: chunks of 32 neighbours are decoded at once.
template <class T>
void decode_rows(const Nf4& w, int64_t n, int64_t depth, int64_t k, int64_t columns, float* out) {
  const DequantizeBlocks d = w.blocks;
  for (int64_t i = 0; i < depth; ++i) {
    // a short piece of every row: too short for the processor to read ahead
    const int64_t ahead = n + i + kRowsAhead;
    if (ahead < w.n) prefetch(d.packed + (ahead * w.k + k) / 2, columns / 2);
    for (int64_t j = 0; j < columns; j += kStep) {
      const int64_t at = (n + i) * w.k + k + j;
      const float scale = block_scale(d, at >> w.block_shift);
      const Decoder<float> decode(d.code, scale, static_cast<const T*>(nullptr));
      float* to = out + j * kDepth + i * kSliver;
      if constexpr (kSliver == kStep) {
        decode(d.packed + at / 2, to);
      } else {
        float chunk[kStep];
        decode(d.packed + at / 2, chunk);
        for (int64_t part = 0; part < kStep; part += kSliver) {
          memcpy(to + part * kDepth, chunk + part, kSliver * sizeof(float));
        }
      }
    }
  }
}

// Rows of the weight are columns of the panel: lane j of a vector is row j, so that nothing has to
// be transposed but words of eight codes.
template <class T>
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
      for (int64_t i = 0; i < kWidth; ++i) {
        scales[i] = block_scale(d, (starts[i] + p) >> shift);
      }
    }
    const Vec scale = load(scales);
    Words words[4];
    load_words(rows, p / 2, words);
    float* to = out + p * kSliver;
#pragma GCC unroll 4
    for (const Words& word : words) {
      // high nibble first
#pragma GCC unroll 4
      for (int byte = 0; byte < 32; byte += 8, to += 2 * kSliver) {
        store(to, rounded<T>(multiply(lookup(word, byte + 4), scale)));
        store(to + kSliver, rounded<T>(multiply(lookup(word, byte), scale)));
      }
    }
  }
}

template <class T>
void decode_columns(
    const Nf4& w, int64_t k, int64_t depth, int64_t n, int64_t columns, float* out) {
  for (int64_t j = 0; j < columns; j += kSliver, out += kSliver * kDepth) {
    decode_lanes<T>(w, n + j, k, depth, out);
    if (columns - j > kWidth) decode_lanes<T>(w, n + j + kWidth, k, depth, out + kWidth);
  }
}

// Slivers kSliver * kDepth apart, rows kSliver apart.
template <class T>
Panel pack_right(
    const Right& right, int64_t k, int64_t depth, int64_t column, int64_t columns, float* out) {
  if (right.weight == nullptr) {
    pack_dense<T>(right, k, depth, column, columns, out, kSliver, kSliver * kDepth);
  } else if (!in_chunks(*right.weight)) {
    decode_any<T>(*right.weight, right.form == Right::kNf4Columns, k, depth, column, columns, out);
  } else if (right.form == Right::kNf4Columns) {
    decode_columns<T>(*right.weight, k, depth, column, columns, out);
  } else {
    decode_rows<T>(*right.weight, k, depth, column, columns, out);
  }
  return {out, kSliver, kSliver * kDepth};
}
