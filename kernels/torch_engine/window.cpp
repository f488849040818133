// One window of a head in float32: E = 2^(factor h w^T + shift) without the cells of labels, its row sums, E w, and
// E^T hs, in one parallel region. E lies transposed, a row of tokens for each class: then w, h and E feed all three
// products as they lie, and the sums run along vectors.
//
//   item   a share of the classes, taken by whichever thread is free: nothing waits for a thread that is put aside
//   panel  classes of an item that pass through a core's own cache together, from w to the last product
//   tile   MR x NR numbers of a product, which stay in registers
//
// Items do not depend on which thread takes them, and their sums are added up in order: results are the same each time.
#include <ATen/cpu/vec/vec.h>

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#include <algorithm>
#include <cstdint>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int W = Vec::size();
constexpr int NR = 2 * W;                // columns of a tile
constexpr int MR = W >= 16 ? 14 : 6;     // rows of a tile: MR * 2 sums, two of b and one of a fit into the registers
constexpr int64_t DEPTH = 512;           // of a product that is summed in registers before it is stored

enum class Left { rows, groups, columns };  // a[i * step + k]; the same in groups of NR of k; a[k * step + i]

struct Operand {
  const float* at;
  int64_t step;   // between rows (Left::rows) or columns (Left::columns); of groups, from one group to the next
};

template <Left left, int M>
inline void tile(int64_t depth, Operand a, const float* b, float* c, int64_t ldc, bool add) {
  Vec sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = Vec(0.f);
  if (add) {
    for (int i = 0; i < M; ++i) {
      __builtin_prefetch(c + i * ldc);
      __builtin_prefetch(c + i * ldc + NR - 1);
    }
  }
  auto multiply = [&](const float* from, int64_t stride, const float* row) __attribute__((always_inline)) {
    const Vec low = Vec::loadu(row), high = Vec::loadu(row + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec x(from[i * stride]);
      sum[i][0] = at::vec::fmadd(x, low, sum[i][0]);
      sum[i][1] = at::vec::fmadd(x, high, sum[i][1]);
    }
  };
  if constexpr (left == Left::groups) {
    for (int64_t start = 0; start < depth; start += NR) {
      const float* group = a.at + start / NR * a.step;
      const int64_t some = std::min<int64_t>(NR, depth - start);
      for (int64_t k = 0; k < some; ++k) multiply(group + k, NR, b + (start + k) * NR);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      if constexpr (left == Left::rows) multiply(a.at + k, a.step, b + k * NR);
      else multiply(a.at + k * a.step, 1, b + k * NR);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2; ++j) {
      float* to = c + i * ldc + j * W;
      (add ? Vec::loadu(to) + sum[i][j] : sum[i][j]).store(to);
    }
  }
}

template <Left left, int M = MR>
inline void tile_of(int rows, int64_t depth, Operand a, const float* b, float* c, int64_t ldc, bool add) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<left, M - 1>(rows, depth, a, b, c, ldc, add);
  }
  tile<left, M>(depth, a, b, c, ldc, add);
}

// c [rows, columns] (+)= a [rows, depth] b [depth, NR], columns <= NR, in tiles of nearly equal height
template <Left left>
inline void product(
    int64_t rows, int64_t depth, Operand a, const float* b, float* c, int64_t ldc, int64_t columns, bool add) {
  const int64_t tiles = (rows + MR - 1) / MR, advance = left == Left::rows ? a.step : left == Left::groups ? NR : 1;
  alignas(64) float edge[MR * NR];
  for (int64_t t = 0, i = 0; t < tiles; ++t) {
    const int64_t end = rows * (t + 1) / tiles;
    const Operand from{a.at + i * advance, a.step};
    if (columns >= NR) {
      tile_of<left>(end - i, depth, from, b, c + i * ldc, ldc, add);
    } else {
      tile_of<left>(end - i, depth, from, b, edge, NR, false);
      for (int64_t r = i; r < end; ++r)
        for (int64_t j = 0; j < columns; ++j) c[r * ldc + j] = edge[(r - i) * NR + j] + (add ? c[r * ldc + j] : 0.f);
    }
    i = end;
  }
}

// x [rows, columns] in groups of NR columns, the last one filled up by zeros: [columns / NR, rows, NR]
void by_columns(const float* x, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, float* out) {
  for (int64_t j = 0; j < columns; j += NR, out += rows * NR) {
    const float* from = x + j * column_step;
    const int64_t some = std::min<int64_t>(NR, columns - j);
    if (column_step == 1 && some == NR) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < NR; k += W) Vec::loadu(from + i * row_step + k).store(out + i * NR + k);
    } else {
      for (int64_t k = 0; k < NR; ++k)
        for (int64_t i = 0; i < rows; ++i) out[i * NR + k] = k < some ? from[i * row_step + k * column_step] : 0.f;
    }
  }
}

}  // namespace

extern "C" {

// Sizes in elements. Pointers to what is not wanted are null. In kernels/torch_engine/cpp_window.py the same.
struct Window {
  const float* h;         // [tokens, hidden]
  const float* w;         // [vocab, hidden], by its steps
  const float* hs;        // [tokens, hidden]: s h, for dw
  const float* shift;     // [tokens]
  const int64_t* labelled;  // [labels] tokens, ordered by their
  const int64_t* classes;   // [labels] classes
  float* e;               // [vocab, lanes], kept
  float* dh;              // [tokens, hidden]: E w
  float* dw;              // [vocab, hidden]
  double* total;          // [items + 1, lanes]: row sums, of all classes in the first
  float* packed_h;        // [padded hidden, lanes]
  float* packed_hs;       // [padded hidden, tokens]
  float* sums;            // [items, tokens, padded hidden]
  float* own;             // [threads, panel (padded hidden + lanes)]
  int64_t tokens, hidden, vocab, labels, lanes, padded_hidden, w_row, w_column, items, panel, threads, fresh;
  double factor;
};

}  // extern "C"

namespace {

void exponentials(const Window& at, int64_t v, int64_t p, const float* packed_w, float* e) {
  for (int64_t k = 0; k < at.hidden; k += DEPTH)
    for (int64_t j = 0; j < at.tokens; j += NR)
      product<Left::groups>(
          p, std::min(DEPTH, at.hidden - k), {packed_w + k * p, p * NR}, at.packed_h + j * at.hidden + k * NR, e + j,
          at.lanes, NR, k > 0);
  const Vec factor(static_cast<float>(at.factor));
  for (int64_t j = 0; j < at.tokens; j += W) {
    const Vec shift = Vec::loadu(at.shift + j, std::min<int64_t>(W, at.tokens - j));
    for (int64_t i = 0; i < p; ++i) {
      float* x = e + i * at.lanes + j;
      at::vec::fmadd(Vec::loadu(x), factor, shift).exp2().store(x);
    }
  }
  const int64_t* label = std::lower_bound(at.classes, at.classes + at.labels, v);
  for (; label < at.classes + at.labels && *label < v + p; ++label)
    e[(*label - v) * at.lanes + at.labelled[label - at.classes]] = 0.f;
}

void add_up(const Window& at, int64_t p, const float* e, double* total) {
  alignas(64) float part[W];
  for (int64_t j = 0; j < at.tokens; j += W) {
    Vec sum(0.f);
    for (int64_t i = 0; i < p; ++i) sum = sum + Vec::loadu(e + i * at.lanes + j);
    sum.store(part);
    for (int64_t i = 0; i < std::min<int64_t>(W, at.tokens - j); ++i) total[j + i] += part[i];
  }
}

void weight_gradient(const Window& at, int64_t v, int64_t p, const float* e) {
  for (int64_t j = 0; j < at.hidden; j += NR)
    product<Left::rows>(
        p, at.tokens, {e, at.lanes}, at.packed_hs + j * at.tokens, at.dw + v * at.hidden + j, at.hidden, at.hidden - j,
        !at.fresh);
}

void compute_item(const Window& at, int64_t item, float* own) {
  const int64_t panels = (at.vocab + at.panel - 1) / at.panel;
  const int64_t first = panels * item / at.items, last = panels * (item + 1) / at.items;
  double* total = at.total + (item + 1) * at.lanes;
  float* sums = at.dh ? at.sums + item * at.tokens * at.padded_hidden : nullptr;
  float* packed_w = own + at.panel * at.lanes;
  std::fill_n(total, at.lanes, 0.0);
  for (int64_t q = first; q < last; ++q) {
    const int64_t v = q * at.panel, p = std::min(at.panel, at.vocab - v);
    float* e = at.e ? at.e + v * at.lanes : own;
    by_columns(at.w + v * at.w_row, p, at.hidden, at.w_row, at.w_column, packed_w);
    exponentials(at, v, p, packed_w, e);
    add_up(at, p, e, total);
    if (sums)
      for (int64_t j = 0; j < at.padded_hidden; j += NR)
        product<Left::columns>(
            at.tokens, p, {e, at.lanes}, packed_w + j * p, sums + j, at.padded_hidden, NR, q > first);
    if (at.dw) weight_gradient(at, v, p, e);
  }
}

}  // namespace

extern "C" {

// E (kept where `e` is given), its row sums, and what else is wanted: E w -> dh, E^T hs (+)-> dw.
void sweep(const Window* given) {
  const Window& at = *given;
  for (int64_t j = 0; j < at.tokens; j += NR)
    by_columns(at.h + j * at.hidden, at.hidden, std::min<int64_t>(NR, at.tokens - j), 1, at.hidden,
               at.packed_h + j * at.hidden);
  if (at.dw) by_columns(at.hs, at.tokens, at.hidden, at.hidden, 1, at.packed_hs);
#pragma omp parallel for num_threads(at.threads) schedule(dynamic, 1) if (at.threads > 1)
  for (int64_t item = 0; item < at.items; ++item)
    compute_item(at, item, at.own + omp_get_thread_num() * at.panel * (at.lanes + at.padded_hidden));
  std::fill_n(at.total, at.lanes, 0.0);
  for (int64_t item = 1; item <= at.items; ++item)
    for (int64_t i = 0; i < at.tokens; ++i) at.total[i] += at.total[item * at.lanes + i];
  if (!at.dh) return;
  for (int64_t i = 0; i < at.tokens; ++i) {
    float* to = at.dh + i * at.hidden;
    std::copy_n(at.sums + i * at.padded_hidden, at.hidden, to);
    for (int64_t item = 1; item < at.items; ++item) {
      const float* part = at.sums + (item * at.tokens + i) * at.padded_hidden;
      for (int64_t d = 0; d < at.hidden; ++d) to[d] += part[d];
    }
  }
}

// E^T hs (+)-> dw of a kept E.
void add_weight_gradient(const Window* given) {
  const Window& at = *given;
  by_columns(at.hs, at.tokens, at.hidden, at.hidden, 1, at.packed_hs);
#pragma omp parallel for num_threads(at.threads) schedule(dynamic, 1) if (at.threads > 1)
  for (int64_t v = 0; v < at.vocab; v += at.panel)
    weight_gradient(at, v, std::min(at.panel, at.vocab - v), at.e + v * at.lanes);
}

}  // extern "C"
