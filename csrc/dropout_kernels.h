// Dropout by Philox4x32 with 7 rounds, over the primitives of one instruction set.
//
// Element k of row m has 16-bit number k & 7 of the words of counter (k >> 3, m, m >> 32, offset)
// under the seed as key, and is dropped iff it is below the threshold.
// Included inside the namespace of that instruction set, after its simd_*.h, which defines:
//   Lanes                              kLanes words of 32 bits, one of each Philox stream
//   broadcast, add, xor3, multiply     multiply: the upper and the lower half of 64-bit products
//   lane_counters()                    which counter a lane has, so that `halves` come in order
//   Halves, halves(w, &lower, &upper)  16-bit numbers of 4 kLanes elements each
//   drop(halves, threshold, scale, x, out)
// Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 4.3.

constexpr uint32_t kRounds = 7;
constexpr int64_t kGroup = 8 * kLanes;  // elements of one call of every lane

struct Philox {
  Lanes keys[kRounds][2];
  Lanes multipliers[2];

  explicit Philox(uint64_t seed) {
    // multiples, not two running sums: gcc 12 -O3 vectorises those into one, with wrong keys
    for (uint32_t round = 0; round < kRounds; ++round) {
      keys[round][0] = broadcast(static_cast<uint32_t>(seed) + round * 0x9e3779b9u);
      keys[round][1] = broadcast(static_cast<uint32_t>(seed >> 32) + round * 0xbb67ae85u);
    }
    multipliers[0] = broadcast(0xd2511f53u);
    multipliers[1] = broadcast(0xcd9e8d57u);
  }

  void operator()(Lanes (&c)[4]) const {
    for (const auto& key : keys) {
      Lanes high0, low0, high2, low2;
      multiply(multipliers[0], c[0], &high0, &low0);
      multiply(multipliers[1], c[2], &high2, &low2);
      c[0] = xor3(high2, c[1], key[0]);
      c[2] = xor3(high0, c[3], key[1]);
      c[1] = low2;
      c[3] = low0;
    }
  }
};

template <class T>
void drop_group(const Philox& philox, const Mask& d, int64_t m, int64_t k, const T* x, T* out) {
  Lanes words[4] = {add(broadcast(static_cast<uint32_t>(k >> 3)), lane_counters()),
                    broadcast(static_cast<uint32_t>(m)),
                    broadcast(static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32)),
                    broadcast(d.offset)};
  philox(words);
  Halves lower, upper;
  halves(words, &lower, &upper);
  drop(lower, d.threshold, d.scale, x, out);
  drop(upper, d.threshold, d.scale, x + kGroup / 2, out + kGroup / 2);
}

// Columns [k, k + count) of row m, k a multiple of 8; x may be out.
template <class T>
void drop_row(
    const Philox& philox, const Mask& d, int64_t m, int64_t k, int64_t count, const T* x, T* out) {
  int64_t i = 0;
  for (; count - i >= kGroup; i += kGroup) drop_group(philox, d, m, k + i, x + i, out + i);
  if (i < count) {
    T in[kGroup] = {}, dropped[kGroup];
    memcpy(in, x + i, (count - i) * sizeof(T));
    drop_group(philox, d, m, k + i, in, dropped);
    memcpy(out + i, dropped, (count - i) * sizeof(T));
  }
}

template <class T>
void dropout(const Dropout& d, int64_t first, int64_t last) {
  const Philox philox(d.mask.seed);
  const int64_t segments = (d.k + kSegment - 1) / kSegment;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t m = unit / segments, k = unit % segments * kSegment;
    const int64_t count = d.k - k < kSegment ? d.k - k : kSegment;
    drop_row(philox, d.mask, m, k, count, static_cast<const T*>(d.x) + m * d.row_stride + k,
             static_cast<T*>(d.out) + m * d.k + k);
  }
}
