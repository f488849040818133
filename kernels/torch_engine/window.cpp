// One window of a head in float32: E = 2^(factor h w^T + shift) without the cells of labels, its row sums, E w, and
// E^T s h, in one or two parallel regions. E lies transposed, a row of tokens for each class: then w, h and E feed all three
// products as they lie, and the sums run along vectors.
//
//   item   a share of the classes, taken by whichever thread is free: nothing waits for a thread that is put aside
//   panel  classes of an item that pass through a core's own cache together, from w to the last product
//   tile   MR x NR numbers of a product, which stay in registers
//
// Items do not depend on which thread takes them, and their sums are added up in order: results are the same each time.
#include "tiles.h"

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#include <cmath>
#include <limits>

extern "C" {

// Sizes in elements. Pointers to what is not wanted are null. In kernels/torch_engine/cpp_window.py the same.
struct Window {
  const float* h;           // [tokens, hidden]
  const float* w;           // [vocab, hidden], by its steps
  const int64_t* y;         // [tokens, labels]
  const int64_t* labelled;  // [cells] tokens of labels, ordered by their
  const int64_t* classes;   // [cells] classes
  const float* shift;       // [tokens]
  const float* s;           // [tokens] row scales
  const float* t;           // [tokens, labels] terms of the labels
  const float* g;           // [tokens] gradients of the sum over all logits, and what they multiply:
  const float* uw;          // [hidden]
  double* picked;           // [tokens, labels]
  float* level;             // [tokens]
  float* e;                 // [vocab, lanes], kept
  float* dh;                // [tokens, hidden]
  float* dw;                // [vocab, hidden]
  double* total;            // [items + 1, lanes]: row sums, of all classes in the first
  float* packed_h;          // [padded hidden, lanes]
  float* packed_hs;         // [padded hidden, tokens]
  float* sums;              // [items, tokens, padded hidden]: shares of E w
  float* own;               // [threads, panel (padded hidden + lanes)]
  int64_t tokens, hidden, vocab, labels, cells, lanes, padded_hidden, w_row, w_column, items, panel, threads;
  int64_t row_threads;      // of what is done once a token, which is little work for few threads
  int64_t samples, fresh;   // `samples` classes are looked at for a level; `fresh`: nothing was added to dw yet
  double factor;
};

}  // extern "C"

namespace {

void pack_hidden(const Window& at) {
#pragma omp parallel for num_threads(at.row_threads) if (at.row_threads > 1)
  for (int64_t j = 0; j < at.tokens; j += NR)
    by_columns(
        at.h + j * at.hidden, at.hidden, std::min<int64_t>(NR, at.tokens - j), 1, at.hidden, nullptr,
        at.packed_h + j * at.hidden);
}

void pack_scaled_hidden(const Window& at) {
  by_columns(at.h, at.tokens, at.hidden, at.hidden, 1, at.s, at.packed_hs);
}

// h w^T of p classes, transposed: e [p, lanes]
void logits(const Window& at, int64_t p, const float* packed_w, float* e) {
  for (int64_t k = 0; k < at.hidden; k += DEPTH)
    for (int64_t j = 0; j < at.tokens; j += NR)
      product<Left::groups>(
          p, std::min(DEPTH, at.hidden - k), {packed_w + k * p, p * NR}, at.packed_h + j * at.hidden + k * NR, e + j,
          at.lanes, NR, k > 0);
}

void exponentials(const Window& at, int64_t v, int64_t p, float* e) {
  const Vec factor(static_cast<float>(at.factor));
  for (int64_t j = 0; j < at.tokens; j += W) {
    const Vec shift = Vec::loadu(at.shift + j, std::min<int64_t>(W, at.tokens - j));
    for (int64_t i = 0; i < p; ++i) {
      float* x = e + i * at.lanes + j;
      at::vec::fmadd(Vec::loadu(x), factor, shift).exp2().store(x);
    }
  }
  const int64_t* end = at.classes + at.cells;
  for (const int64_t* label = std::lower_bound(at.classes, end, v); label < end && *label < v + p; ++label)
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
  float* sums = at.sums ? at.sums + item * at.tokens * at.padded_hidden : nullptr;
  float* packed_w = own + at.panel * at.lanes;
  std::fill_n(total, at.lanes, 0.0);
  for (int64_t q = first; q < last; ++q) {
    const int64_t v = q * at.panel, p = std::min(at.panel, at.vocab - v);
    float* e = at.e ? at.e + v * at.lanes : own;
    by_columns(at.w + v * at.w_row, p, at.hidden, at.w_row, at.w_column, nullptr, packed_w);
    logits(at, p, packed_w, e);
    exponentials(at, v, p, e);
    add_up(at, p, e, total);
    if (sums)
      for (int64_t j = 0; j < at.padded_hidden; j += NR)
        product<Left::columns>(
            at.tokens, p, {e, at.lanes}, packed_w + j * p, sums + j, at.padded_hidden, NR, q > first);
    if (at.dw) weight_gradient(at, v, p, e);
  }
}

void finish_hidden(const Window& at, int64_t i) {
  float* to = at.dh + i * at.hidden;
  std::copy_n(at.sums + i * at.padded_hidden, at.hidden, to);
  for (int64_t item = 1; item < at.items; ++item) {
    const float* part = at.sums + (item * at.tokens + i) * at.padded_hidden;
    for (int64_t d = 0; d < at.hidden; ++d) to[d] += part[d];
  }
  for (int64_t d = 0; d < at.hidden; ++d) to[d] *= at.s[i];
  for (int64_t k = 0; k < at.labels; ++k) {
    const float* row = at.w + at.y[i * at.labels + k] * at.w_row;
    const float term = at.t[i * at.labels + k];
    for (int64_t d = 0; d < at.hidden; ++d) to[d] += term * row[d * at.w_column];
  }
  if (at.uw)
    for (int64_t d = 0; d < at.hidden; ++d) to[d] += at.g[i] * at.uw[d];
}

}  // namespace

extern "C" {

// h w^T of the labels -> picked, before the transform.
void label_logits(const Window* given) {
  const Window& at = *given;
#pragma omp parallel for num_threads(at.row_threads) if (at.row_threads > 1)
  for (int64_t i = 0; i < at.tokens; ++i) {
    for (int64_t k = 0; k < at.labels; ++k) {
      const float *row = at.w + at.y[i * at.labels + k] * at.w_row, *h = at.h + i * at.hidden;
      double sum[8] = {};
      int64_t d = 0;
      for (; d + 8 <= at.hidden; d += 8)
        for (int64_t j = 0; j < 8; ++j) sum[j] += static_cast<double>(row[(d + j) * at.w_column]) * h[d + j];
      for (; d < at.hidden; ++d) sum[0] += static_cast<double>(row[d * at.w_column]) * h[d];
      at.picked[i * at.labels + k] =
          ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  }
}

// log mean exp of factor' h w^T over `samples` classes spread evenly -> level, in natural logarithms.
void sampled_level(const Window* given) {
  const Window& at = *given;
  const int64_t step = std::max<int64_t>(1, at.vocab / at.samples), count = (at.vocab + step - 1) / step;
  const Vec factor(static_cast<float>(at.factor));
  float* packed_w = at.own + at.panel * at.lanes;
  float* most = at.level;
  pack_hidden(at);
  std::fill_n(most, at.tokens, -std::numeric_limits<float>::infinity());
  std::fill_n(at.total, at.tokens, 0.0);
  for (int64_t q = 0; q < count; q += at.panel) {
    const int64_t p = std::min(at.panel, count - q);
    by_columns(at.w + q * step * at.w_row, p, at.hidden, step * at.w_row, at.w_column, nullptr, packed_w);
    logits(at, p, packed_w, at.own);
    alignas(64) float sums[W], largest[W];
    for (int64_t j = 0; j < at.tokens; j += W) {
      const int64_t some = std::min<int64_t>(W, at.tokens - j);
      const Vec before = Vec::loadu(most + j, some);
      Vec top = before, sum(0.f);
      for (int64_t i = 0; i < p; ++i) top = at::vec::maximum(top, Vec::loadu(at.own + i * at.lanes + j) * factor);
      for (int64_t i = 0; i < p; ++i)
        sum = sum + at::vec::fmsub(Vec::loadu(at.own + i * at.lanes + j), factor, top).exp2();
      sum.store(sums);
      top.store(largest);
      for (int64_t i = 0; i < some; ++i) {
        const double scaled = at.total[j + i] == 0 ? 0 : at.total[j + i] * std::exp2(most[j + i] - largest[i]);
        at.total[j + i] = scaled + sums[i];
        most[j + i] = largest[i];
      }
    }
  }
  for (int64_t i = 0; i < at.tokens; ++i)
    at.level[i] = static_cast<float>((most[i] + std::log2(at.total[i] / count)) / std::log2(std::exp(1.0)));
}

// E (kept where `e` is given), its row sums, shares of E w, and, with row scales that are known, E^T s h (+)-> dw.
void sweep(const Window* given) {
  const Window& at = *given;
  pack_hidden(at);
  if (at.dw) pack_scaled_hidden(at);
#pragma omp parallel for num_threads(at.threads) schedule(dynamic, 1) if (at.threads > 1)
  for (int64_t item = 0; item < at.items; ++item)
    compute_item(at, item, at.own + omp_get_thread_num() * at.panel * (at.lanes + at.padded_hidden));
  std::fill_n(at.total, at.lanes, 0.0);
  for (int64_t item = 1; item <= at.items; ++item)
    for (int64_t i = 0; i < at.tokens; ++i) at.total[i] += at.total[item * at.lanes + i];
}

// s E w and what labels and sums add -> dh; E^T s h of a kept E (+)-> dw, and what labels add.
void gradients(const Window* given) {
  const Window& at = *given;
  if (at.dh) {
#pragma omp parallel for num_threads(at.row_threads) if (at.row_threads > 1)
    for (int64_t i = 0; i < at.tokens; ++i) finish_hidden(at, i);
  }
  if (!at.dw) return;
  if (at.e) {
    pack_scaled_hidden(at);
#pragma omp parallel for num_threads(at.threads) schedule(dynamic, 1) if (at.threads > 1)
    for (int64_t v = 0; v < at.vocab; v += at.panel)
      weight_gradient(at, v, std::min(at.panel, at.vocab - v), at.e + v * at.lanes);
  }
  for (int64_t i = 0; i < at.tokens; ++i) {
    for (int64_t k = 0; k < at.labels; ++k) {
      float* to = at.dw + at.y[i * at.labels + k] * at.hidden;
      const float term = at.t[i * at.labels + k];
      for (int64_t d = 0; d < at.hidden; ++d) to[d] += term * at.h[i * at.hidden + d];
    }
  }
}

}  // extern "C"
