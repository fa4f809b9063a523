// The C ABI of linear layers: cuts products into blocks and spreads them over threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fastlora.h"
#include "isa.h"
#include "parallel.h"

namespace fastlora {
namespace {

// --- memory ----------------------------------------------------------------------------------

// Aligned numbers that are not initialised.
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(int64_t count) { grow(count); }
  ~Numbers() { std::free(memory_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  // What was there is lost.
  void grow(int64_t count) {
    if (count <= count_) return;
    std::free(memory_);
    memory_ = std::malloc(count * sizeof(float) + kAlignment);
    if (memory_ == nullptr) std::abort();  // there is no Python here to raise a MemoryError
    count_ = count;
  }

  float* get() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr uintptr_t kAlignment = 64;
  void* memory_ = nullptr;
  int64_t count_ = 0;
};

// Kept by each thread: fresh memory costs a page fault per 4 KB, more than small layers take.
float* scratch() {
  thread_local const Numbers memory(kScratch);
  return memory.get();
}

// Kept by each thread that calls, as large as its largest layer has needed.
float* shared(int64_t count) {
  thread_local Numbers memory;
  memory.grow(count);
  return memory.get();
}

// --- how work is cut ---------------------------------------------------------------------------

struct Cut {
  int64_t row_blocks, column_blocks, units;  // units: of kUnit columns, per block

  int64_t blocks() const { return row_blocks * column_blocks; }
};

// Cycles of a block per unit of depth: the sums, packing the left operand, making the panel. Only
// their ratios matter.
double cost(int64_t rows, int64_t units) { return rows * (units + 0.15) + 7.0 * units; }

// The cut of at most kBlockRows rows whose slowest thread is done first.
Cut best_cut(int64_t rows, int64_t columns, int threads) {
  const int64_t units = ceil_div(columns, kUnit);
  Cut best{};
  double least = 0;
  for (int64_t row_blocks = 1; row_blocks <= std::min<int64_t>(rows, threads); ++row_blocks) {
    for (int64_t width = std::min(units, kBlockColumns / kUnit); width > 0; --width) {
      const Cut cut{row_blocks, ceil_div(units, width), width};
      const double time = ceil_div(cut.blocks(), threads) * cost(ceil_div(rows, row_blocks), width);
      if (best.units == 0 || time < least) {
        best = cut;
        least = time;
      }
    }
  }
  return best;
}

// fewest cycles that are worth a thread: about 20 microseconds
constexpr double kCycles = 50000;

int64_t panels(const Term& term) { return term.depth == 0 ? 0 : ceil_div(term.depth, term.step); }

// Panels of nearly equal depth, in whole chunks of codes.
Term term_of(const Kernels& isa, int dtype, const Left& left, const Right& right, int64_t depth) {
  const int64_t most = kDepth * isa.per_slot[dtype];
  const int64_t count = std::max<int64_t>(1, ceil_div(depth, most));
  return {left, right, depth, ceil_div(ceil_div(depth, count), kUnit) * kUnit, nullptr, 0};
}

// Packs rows [row, row + rows) of the left operand of a term once for all blocks.
void pack(
    const Kernels& isa, int dtype, int64_t row, int64_t rows, int threads, Term* term, float* out) {
  const auto kernel = isa.pack_left[dtype];
  const int64_t depth = term->depth, step = term->step;
  const int64_t row_bytes = term->left.stride * (dtype == FASTLORA_FP32 ? 4 : 2);
  const char* data = static_cast<const char*>(term->left.data) + row * row_bytes;
  const int64_t grain = ceil_div(32768, std::max<int64_t>(depth, 1));
  parallel_for(rows, grain, threads, [&](int64_t first, int64_t last) {
    // a row from end to end, as the processor reads ahead
    for (int64_t i = first; i < last; ++i) {
      for (int64_t k = 0; k < depth; k += step) {
        kernel(data + i * row_bytes, k, std::min(depth - k, step),
               out + (k / step * rows + i) * kLeftStride);
      }
    }
  });
  term->packed = out;
  term->packed_rows = rows;
}

// Rows [first, first + rows) of a product, at most kBlockRows.
void run_rows(const Kernels& isa,
              int dtype,
              Product p,
              int64_t first,
              int64_t rows,
              int64_t columns,
              int threads) {
  std::vector<Term> terms(p.terms, p.terms + p.count);
  p.terms = terms.data();
  int64_t runs = panels(p.lora);
  for (const Term& term : terms) runs += panels(term);
  const double cycles = cost(rows, ceil_div(columns, kUnit)) * kDepth * runs;
  const int team = cycles < 2 * kCycles ? 1 : threads;

  float* out = shared(runs * rows * kLeftStride);
  const auto pack_next = [&](Term* term) {
    pack(isa, dtype, first, rows, team, term, out);
    out += panels(*term) * rows * kLeftStride;
  };
  pack_next(&p.lora);
  for (Term& term : terms) pack_next(&term);

  const auto kernel = isa.multiply[dtype];
  const Cut cut = best_cut(rows, columns, team);
  parallel_tasks(cut.blocks(), team, [&](int64_t task) {
    const int64_t row_block = task % cut.row_blocks, column_block = task / cut.row_blocks;
    Block block;
    block.packed_row = rows * row_block / cut.row_blocks;
    block.row = first + block.packed_row;
    block.rows = rows * (row_block + 1) / cut.row_blocks - block.packed_row;
    block.column = column_block * cut.units * kUnit;
    block.columns = std::min(columns - block.column, cut.units * kUnit);
    kernel(p, block, scratch());
  });
}

void run(
    const Kernels& isa, int dtype, const Product& p, int64_t rows, int64_t columns, int threads) {
  if (columns == 0) return;
  const int64_t parts = ceil_div(rows, kBlockRows);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    run_rows(isa, dtype, p, first, last - first, columns, threads);
  }
}

// --- adapters ----------------------------------------------------------------------------------

int64_t padded(int64_t columns) { return ceil_div(columns, kUnit) * kUnit; }

// Threads that are worth it for a pass over tokens; their number decides how db is summed.
int team_of(int64_t rows, int64_t columns, int64_t r, int threads) {
  const double cycles = static_cast<double>(rows) * columns * (0.5 + r / 16.0);
  return static_cast<int>(std::clamp(cycles / kCycles, 1.0, static_cast<double>(threads)));
}

// An adapter as Tokens has it, for all threads.
void pack_adapter(const Kernels& isa,
                  int dtype,
                  const Right& adapter,
                  int64_t depth,
                  int64_t r,
                  float* out,
                  int threads) {
  const auto kernel = isa.pack_adapter[dtype];
  parallel_for(depth, ceil_div(32768, r), threads,
               [&](int64_t first, int64_t last) { kernel(adapter, {first, last}, r, out); });
}

// --- operands ----------------------------------------------------------------------------------

Mask mask_of(const int64_t* state, uint32_t threshold, float scale) {
  if (state == nullptr) return {};
  return {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(state[1]), threshold, scale};
}

int log2_of(int64_t power) {
  int log = 0;
  while (power >> log > 1) ++log;
  return log;
}

Nf4 weight_of(const fastlora_nf4& w) {
  return {{w.packed, w.absmax, w.absmax_codes, w.absmax2, w.code2, w.code, nullptr, w.n * w.k,
           w.blocksize, w.offset ? *w.offset : 0.0f},
          w.n,
          w.k,
          log2_of(w.blocksize)};
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

void fastlora_lora_down(const void* x,
                        int64_t x_stride,
                        int dtype,
                        int64_t m,
                        int64_t k,
                        const void* a,
                        int64_t a_stride,
                        int64_t r,
                        const int64_t* state,
                        uint32_t threshold,
                        float keep_scale,
                        void* s,
                        int threads) {
  const Mask mask = mask_of(state, threshold, keep_scale);
  const Kernels& isa = kernels();
  const int team = team_of(m, k, r, threads);
  float* adapter = shared(k * padded(r));
  pack_adapter(isa, dtype, {Right::kColumns, a, a_stride, nullptr, 1}, k, r, adapter, team);
  Tokens t{};
  t.tokens = {x, x_stride};
  t.drop = state ? &mask : nullptr;
  t.adapter = adapter;
  t.out = s;
  t.out_stride = r;
  t.r = r;
  const auto kernel = kernels().pass_tokens[dtype];
  parallel_for(m, 1, team,
               [&](int64_t first, int64_t last) { kernel(t, {first, last}, {0, k}, scratch()); });
}

void fastlora_linear(const void* x,
                     int64_t x_stride,
                     int dtype,
                     int64_t m,
                     int64_t n,
                     const fastlora_nf4* w,
                     const void* bias,
                     const void* s,
                     int64_t s_stride,
                     const void* b,
                     int64_t b_stride,
                     int64_t r,
                     float scale,
                     void* y,
                     int threads) {
  const Kernels& isa = kernels();
  const Nf4 weight = w ? weight_of(*w) : Nf4{};
  const Right packed{Right::kNf4Columns, nullptr, 0, &weight, 1};
  const Term term = term_of(isa, dtype, {x, x_stride}, packed, weight.k);
  const Right up{Right::kColumns, b, b_stride, nullptr, scale};
  Product p{};
  p.lora = term_of(isa, dtype, {s, s_stride}, up, r);
  p.terms = &term;
  p.count = w ? 1 : 0;
  p.bias = bias;
  p.out = y;
  p.out_stride = n;
  p.accumulate = !w;
  run(isa, dtype, p, m, n, threads);
}

void fastlora_lora_bwd_ds_db(const void* dy,
                             int64_t dy_stride,
                             int dtype,
                             int64_t m,
                             int64_t n,
                             const void* b,
                             int64_t b_stride,
                             const void* s,
                             int64_t s_stride,
                             int64_t r,
                             float scale,
                             void* ds,
                             int64_t ds_stride,
                             float* db,
                             int threads) {
  const Kernels& isa = kernels();
  // each thread has rows of ds, and a db of its own; those are summed up in the order of the rows,
  // and all together are no larger than dy
  const int64_t most = std::max<int64_t>(1, std::min(ceil_div(m, kTokenRows), m / r));
  const int team = static_cast<int>(std::min<int64_t>(team_of(m, n, 2 * r, threads), most));
  const int64_t stride = padded(n), size = r * stride;
  float* adapter = shared(n * padded(r) + team * size);
  float* partial = adapter + n * padded(r);
  pack_adapter(isa, dtype, {Right::kRows, b, b_stride, nullptr, scale}, n, r, adapter, team);
  const Left factors{s, s_stride};
  Tokens t{};
  t.tokens = {dy, dy_stride};
  t.adapter = adapter;
  t.out = ds;
  t.out_stride = ds_stride;
  t.factors = &factors;
  t.reduced_stride = stride;
  t.r = r;
  const auto kernel = isa.pass_tokens[dtype];
  parallel_tasks(team, team, [&](int64_t part) {
    Tokens own = t;
    own.reduced = partial + part * size;
    std::memset(own.reduced, 0, size * sizeof(float));
    kernel(own, {m * part / team, m * (part + 1) / team}, {0, n}, scratch());
  });
  parallel_for(ceil_div(n, kUnit), ceil_div(1024, r * team), team, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kUnit, last = std::min(first + kUnit, n);
      for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = first; j < last; ++j) {
          float sum = 0;
          for (int part = 0; part < team; ++part) sum += partial[part * size + i * stride + j];
          db[j * r + i] = scale * sum;
        }
      }
    }
  });
}

void fastlora_lora_bwd_da(const void* x,
                          int64_t x_stride,
                          int dtype,
                          int64_t m,
                          int64_t k,
                          const void* ds,
                          int64_t ds_stride,
                          int64_t r,
                          const int64_t* state,
                          uint32_t threshold,
                          float keep_scale,
                          float* da,
                          int threads) {
  const Mask mask = mask_of(state, threshold, keep_scale);
  const int team = team_of(m, k, r, threads);
  const Left factors{ds, ds_stride};
  Tokens t{};
  t.tokens = {x, x_stride};
  t.drop = state ? &mask : nullptr;
  t.factors = &factors;
  t.reduced_stride = padded(k);
  t.reduced = shared(r * t.reduced_stride);
  t.r = r;
  const auto kernel = kernels().pass_tokens[dtype];
  // each thread has columns of da
  parallel_for(ceil_div(k, kUnit), 1, team, [&](int64_t first, int64_t last) {
    const Range columns{first * kUnit, std::min(last * kUnit, k)};
    const int64_t width = columns.last - columns.first;
    for (int64_t i = 0; i < r; ++i) {
      std::memset(t.reduced + i * t.reduced_stride + columns.first, 0, width * sizeof(float));
    }
    kernel(t, {0, m}, columns, scratch());
    for (int64_t i = 0; i < r; ++i) {
      std::memcpy(da + i * k + columns.first, t.reduced + i * t.reduced_stride + columns.first,
                  width * sizeof(float));
    }
  });
}

void fastlora_linear_dx(const void* const* dys,
                        const int64_t* dy_strides,
                        const fastlora_nf4* weights,
                        int64_t count,
                        int dtype,
                        int64_t m,
                        int64_t k,
                        const void* ds,
                        int64_t ds_stride,
                        const void* a,
                        int64_t a_stride,
                        int64_t r,
                        const int64_t* state,
                        uint32_t threshold,
                        float keep_scale,
                        int accumulate,
                        void* dx,
                        int threads) {
  const Mask mask = mask_of(state, threshold, keep_scale);
  const Kernels& isa = kernels();
  std::vector<Nf4> packed(count);
  std::vector<Term> terms(count);
  for (int64_t i = 0; i < count; ++i) {
    packed[i] = weight_of(weights[i]);
    const Right weight{Right::kNf4Rows, nullptr, 0, &packed[i], 1};
    terms[i] = term_of(isa, dtype, {dys[i], dy_strides[i]}, weight, packed[i].n);
  }
  const Right down{Right::kRows, a, a_stride, nullptr, 1};
  Product p{};
  p.lora = term_of(isa, dtype, {ds, ds_stride}, down, r);
  p.mask = state ? &mask : nullptr;
  p.terms = terms.data();
  p.count = count;
  p.out = dx;
  p.out_stride = k;
  p.accumulate = accumulate;
  run(isa, dtype, p, m, k, threads);
}
