// The micro-kernel: a tile of sums in registers, over the primitives of one instruction set.
//
// Included inside the namespace of that instruction set, after its simd_*.h, which defines:
//   Vec, kWidth             fp32 numbers of a register
//   kTileRows               rows of the largest tile, of two registers each
//   load, store, splat, fma
//
// Operands are packed in slots of 32 bits, along the depth: one fp32 number, or what another Format
// says. The left operand lies in rows kLeftStride slots apart. The right one is cut into slivers of
// kSliver columns, the width of a tile.

constexpr int64_t kSliver = 2 * kWidth;

struct Fp32Format {
  using Number = float;
  static constexpr int64_t kPerSlot = 1;
  static constexpr int kRows = kTileRows;

  static Vec accumulate(Vec x, Vec w, Vec sums) { return fma(x, w, sums); }
};

struct Panel {
  const float* data;
  int64_t row;     // from a row of a sliver to the next
  int64_t sliver;  // from a sliver to the next
};

template <class Format, int kRows, int kVecs>
[[gnu::noinline]] void tile(
    const float* left, const float* right, int64_t row, int64_t depth, float* c, int64_t stride) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums[i][j] = load(c + i * stride + j * kWidth);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, right += row) {
    Vec w[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) w[j] = load(right + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = splat(left[i * kLeftStride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Format::accumulate(x, w[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(c + i * stride + j * kWidth, sums[i][j]);
  }
}

template <class Format, int kVecs, int kRows = kTileRows>
void tile_of(int64_t rows,
             const float* left,
             const float* right,
             int64_t row,
             int64_t depth,
             float* c,
             int64_t stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return tile_of<Format, kVecs, kRows - 1>(rows, left, right, row, depth, c, stride);
    }
  }
  tile<Format, kRows, kVecs>(left, right, row, depth, c, stride);
}

// c [rows, columns] += left [rows, depth] right [depth, columns]; rows at most Format::kRows,
// depth in slots, c holds whole registers
template <class Format>
void multiply_tiles(int64_t rows,
                    int64_t columns,
                    int64_t depth,
                    const float* left,
                    const Panel& right,
                    float* c,
                    int64_t stride) {
  const float* sliver = right.data;
  for (int64_t j = 0; j < columns; j += kSliver, sliver += right.sliver) {
    if (columns - j > kWidth) {
      tile_of<Format, 2>(rows, left, sliver, right.row, depth, c + j, stride);
    } else {
      tile_of<Format, 1>(rows, left, sliver, right.row, depth, c + j, stride);
    }
  }
}

// Calls body(first, rows) for tiles of nearly equal height.
template <class Format, class Body>
void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + Format::kRows - 1) / Format::kRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles;
    body(first, rows * (tile + 1) / tiles - first);
  }
}
