// Products of matrices that are in cache, exponentials and sigmoids, for native kernels that do more
// with the results than to write them.

#pragma once

#include "lanes.h"

namespace {

// Returns e^x for x that are not above 0, to about one unit in the last place, as Cephes does.
inline Lanes Exp(Lanes x) {
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  const Lanes least = Spread(-87.0f);
  x = x > least ? x : least;
  // Adding it leaves the nearest whole number in the lowest bits.
  constexpr float kShift = 12582912.0f;
  const Lanes shifted = MultiplyAdd(x, Spread(1.44269504088896341f), Spread(kShift));
  const Lanes whole = shifted - kShift;
  Lanes r = MultiplyAdd(whole, Spread(-0.693359375f), x);
  r = MultiplyAdd(whole, Spread(2.12194440e-4f), r);
  Lanes p = Spread(1.9875691500e-4f);
  p = MultiplyAdd(p, r, Spread(1.3981999507e-3f));
  p = MultiplyAdd(p, r, Spread(8.3334519073e-3f));
  p = MultiplyAdd(p, r, Spread(4.1665795894e-2f));
  p = MultiplyAdd(p, r, Spread(1.6666665459e-1f));
  p = MultiplyAdd(p, r, Spread(5.0000001201e-1f));
  p = MultiplyAdd(p, r * r, r + 1.0f);
  return p * (Lanes)(((Ints)shifted << 23) + (127 << 23));
}

inline Lanes Sigmoid(Lanes x) {
  const Lanes e = Exp(x > 0.0f ? -x : x);
  return (x > 0.0f ? Spread(1.0f) : e) / (e + 1.0f);
}

// Rows of a product in registers, and registers that they are wide: their sums, and what is loaded
// for them, fill most registers.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
constexpr int kColumns = kWide * kLanes;

// A matrix whose numbers are broadcast, transposed or not.
struct Left {
  const float* data;
  int64_t row, term;  // numbers between two of either
};

// A matrix in panels of `kColumns` columns, whose terms follow one another.
struct Right {
  const float* data;
  int64_t panel, term;
};

template <int kR, int kW, bool kIsAdded>
inline void MultiplyTile(Left a, const float* b, int64_t b_term, int64_t terms, float* c,
                         int64_t c_row) {
  Lanes sum[kR][kW] = {};
  if constexpr (kIsAdded) {
    for (int r = 0; r < kR; ++r) {
      for (int w = 0; w < kW; ++w) sum[r][w] = Load(c + r * c_row + w * kLanes);
    }
  }
  for (int64_t t = 0; t < terms; ++t) {
    Lanes right[kW];
    for (int w = 0; w < kW; ++w) right[w] = Load(b + t * b_term + w * kLanes);
    for (int r = 0; r < kR; ++r) {
      const Lanes left = Spread(a.data[r * a.row + t * a.term]);
      for (int w = 0; w < kW; ++w) sum[r][w] = MultiplyAdd(left, right[w], sum[r][w]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int w = 0; w < kW; ++w) Store(c + r * c_row + w * kLanes, sum[r][w]);
  }
}

template <int kW, bool kIsAdded>
void MultiplyPanel(Left a, const float* b, int64_t b_term, int64_t terms, float* c,
                          int64_t c_row, int64_t rows) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    MultiplyTile<kRows, kW, kIsAdded>({a.data + row * a.row, a.row, a.term}, b, b_term, terms,
                                      c + row * c_row, c_row);
  }
  for (; row + kRows / 2 <= rows; row += kRows / 2) {
    MultiplyTile<kRows / 2, kW, kIsAdded>({a.data + row * a.row, a.row, a.term}, b, b_term, terms,
                                          c + row * c_row, c_row);
  }
  for (; row < rows; ++row) {
    MultiplyTile<1, kW, kIsAdded>({a.data + row * a.row, a.row, a.term}, b, b_term, terms,
                                  c + row * c_row, c_row);
  }
}

// c = a b, or c += a b; columns are a multiple of kLanes.
template <bool kIsAdded = false>
void Multiply(Left a, Right b, int64_t terms, float* c, int64_t c_row, int64_t rows,
              int64_t columns) {
  for (int64_t column = 0; column < columns; column += kColumns) {
    const float* panel = b.data + column / kColumns * b.panel;
    const int64_t width = std::min<int64_t>(kColumns, columns - column);
    int64_t done = 0;
    for (; done + kColumns <= width; done += kColumns) {
      MultiplyPanel<kWide, kIsAdded>(a, panel, b.term, terms, c + column, c_row, rows);
    }
    for (; done < width; done += kLanes) {
      MultiplyPanel<1, kIsAdded>(a, panel + done, b.term, terms, c + column + done, c_row, rows);
    }
  }
}

inline int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Writes a matrix transposed, block by block of it, whose lines stay in the first cache.
inline void Transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t n = std::min(kBlock, rows - row);
    for (int64_t column = 0; column < columns; ++column) {
      const float* x = from + row * from_stride + column;
      float* y = to + column * to_stride + row;
      if (n == kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) y[i] = x[i * from_stride];
      } else {
        for (int64_t i = 0; i < n; ++i) y[i] = x[i * from_stride];
      }
    }
  }
}

// The same in panels of `kColumns` columns; those beyond the rows are zero.
inline void TransposeToPanels(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                              float* panels) {
  for (int64_t first = 0; first < rows; first += kColumns, panels += columns * kColumns) {
    const int64_t n = std::min<int64_t>(kColumns, rows - first);
    if (n < kColumns) std::fill_n(panels, columns * kColumns, 0.0f);
    Transpose(from + first * from_stride, from_stride, n, columns, panels, kColumns);
  }
}

}  // namespace
