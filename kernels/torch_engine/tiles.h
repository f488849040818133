// Products of float32 matrices in tiles that stay in registers, and the order in which they read their right operand.
// `cpp_library` puts this file in the place of its #include.
#include <ATen/cpu/vec/vec.h>

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

// x [rows, columns] in groups of NR columns, the last one filled up by zeros: [columns / NR, rows, NR]; its rows times
// `scale` where there is one
inline void by_columns(
    const float* x, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, const float* scale,
    float* out) {
  for (int64_t j = 0; j < columns; j += NR, out += rows * NR) {
    const float* from = x + j * column_step;
    const int64_t some = std::min<int64_t>(NR, columns - j);
    if (column_step == 1 && some == NR) {
      for (int64_t i = 0; i < rows; ++i) {
        const Vec factor(scale ? scale[i] : 1.f);
        for (int64_t k = 0; k < NR; k += W) (Vec::loadu(from + i * row_step + k) * factor).store(out + i * NR + k);
      }
    } else {
      for (int64_t k = 0; k < NR; ++k)
        for (int64_t i = 0; i < rows; ++i)
          out[i * NR + k] = k < some ? from[i * row_step + k * column_step] * (scale ? scale[i] : 1.f) : 0.f;
    }
  }
}

}  // namespace
