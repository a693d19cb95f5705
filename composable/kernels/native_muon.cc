// Matrices with the singular vectors of others, and singular values near 1, in float32, for XLA's
// foreign function interface: what Muon makes of its momentum.
//
// Odd polynomials of degree 5, one after the other, are all made of the Gram matrix of the matrix
// that comes first. They commute, so every product between is symmetric, and half of it is computed.
//
// A thread takes whole blocks of a matrix: as many of its rows, or columns where it has fewer of
// them. It multiplies panel by panel: what is multiplied is copied in the order of use, and stays in
// the caches next to the core.

#include <cmath>

#include "products.h"

namespace {

constexpr int64_t kTerms = 128;     // of a product at a time: a panel of them fits the first cache
constexpr float kEpsilon = 1e-8f;   // keeps the norm of zeros from dividing by zero

// A matrix of our own: rows of a multiple of kColumns numbers, those beyond its width zero.
struct Padded {
  int64_t rows, columns, stride;
  float* data;

  // Takes its memory from the front of what is free.
  Padded(int64_t rows, int64_t columns, float*& free)
      : rows(rows), columns(columns), stride(RoundUp(columns, kColumns)), data(free) {
    free += rows * stride;
    for (int64_t i = 0; i < rows; ++i) std::fill(row(i) + columns, row(i) + stride, 0.0f);
  }

  float* row(int64_t i) const { return data + i * stride; }
};

double SumOfSquares(const Padded& x) {
  double total = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    Lanes sum = {};
    for (int64_t j = 0; j < x.stride; j += kLanes) {
      sum = MultiplyAdd(Load(x.row(i) + j), Load(x.row(i) + j), sum);
    }
    total += Sum(sum);
  }
  return total;
}

void Scale(const Padded& x, float factor) {
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < x.stride; j += kLanes) Store(x.row(i) + j, Load(x.row(i) + j) * factor);
  }
}

// c = a b, or a b^T. Where the result is symmetric, half of it is computed and copied.
template <bool kIsTransposed, bool kIsSymmetric>
void MultiplyMatrices(const Padded& a, const Padded& b, const Padded& c) {
  float* panel = PanelOf(kTerms * kColumns);
  for (int64_t term = 0; term < a.columns; term += kTerms) {
    const int64_t terms = std::min(kTerms, a.columns - term);
    for (int64_t column = 0; column < c.columns; column += kColumns) {
      const int64_t first = kIsSymmetric ? column : 0;
      if constexpr (kIsTransposed) {
        const int64_t height = std::min<int64_t>(kColumns, b.rows - column);
        TransposeToPanels(b.row(column) + term, b.stride, height, terms, panel);
      } else {
        for (int64_t t = 0; t < terms; ++t) {
          std::copy_n(b.row(term + t) + column, kColumns, panel + t * kColumns);
        }
      }
      const Left left{a.row(first) + term, a.stride, 1};
      const Right right{panel, kColumns, kColumns};
      float* to = c.row(first) + column;
      if (term == 0) {
        Multiply<false>(left, right, terms, to, c.stride, c.rows - first, kColumns);
      } else {
        Multiply<true>(left, right, terms, to, c.stride, c.rows - first, kColumns);
      }
    }
  }
  if constexpr (kIsSymmetric) {
    for (int64_t first = 0; first + kColumns < c.rows; first += kColumns) {
      const int64_t below = first + kColumns;
      Transpose(c.row(below) + first, c.stride, c.rows - below, kColumns, c.row(first) + below,
                c.stride);
    }
  }
}

// x = a I + b g + c s
void Combine(const float* abc, const Padded& g, const Padded& s, const Padded& x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < x.stride; j += kLanes) {
      Store(x.row(i) + j, MultiplyAdd(Spread(abc[2]), Load(s.row(i) + j),
                                      Load(g.row(i) + j) * abc[1]));
    }
    x.row(i)[i] += abc[0];
  }
}

// A block of a matrix, whose result may be in its place.
struct Block {
  const float* from;
  float* to;
  int64_t rows, columns, stride;
  bool is_tall;  // the matrix has more rows than columns
};

void Orthogonalize(const float* coefficients, int64_t n_polynomials, const Block& block) {
  const auto [from, to, rows, columns, stride, is_tall] = block;
  const int64_t n = is_tall ? columns : rows, width = is_tall ? rows : columns;
  // Of this thread, for the matrices that follow, too.
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(),
                                 2 * n * RoundUp(width, kColumns) + 5 * n * RoundUp(n, kColumns)));
  float* free = memory.data();
  Padded x(n, width, free), y(n, width, free);
  if (is_tall) {
    Transpose(from, stride, rows, columns, x.row(0), x.stride);
  } else {
    for (int64_t i = 0; i < n; ++i) std::copy_n(from + i * stride, width, x.row(i));
  }
  Scale(x, 1.0f / (static_cast<float>(std::sqrt(SumOfSquares(x))) + kEpsilon));
  Padded gram(n, n, free), square(n, n, free), polynomial(n, n, free), product(n, n, free),
      next(n, n, free);
  MultiplyMatrices<true, true>(x, x, gram);
  // The largest singular value of x is at most the root of the norm of its Gram matrix.
  const float bound = static_cast<float>(std::sqrt(SumOfSquares(gram))) + kEpsilon;
  Scale(gram, 1.0f / bound);
  for (int64_t k = 0; k < n_polynomials; ++k) {
    MultiplyMatrices<false, true>(gram, gram, square);
    Combine(coefficients + 3 * k, gram, square, polynomial);
    if (k == 0) {
      std::swap(product, polynomial);
      MultiplyMatrices<false, true>(product, gram, square);
      MultiplyMatrices<false, true>(square, product, gram);
      continue;
    }
    MultiplyMatrices<false, true>(polynomial, product, next);
    std::swap(product, next);
    if (k + 1 < n_polynomials) {
      MultiplyMatrices<false, true>(polynomial, gram, square);
      MultiplyMatrices<false, true>(square, polynomial, gram);
    }
  }
  Scale(product, 1.0f / std::sqrt(bound));
  MultiplyMatrices<false, false>(product, x, y);
  if (is_tall) {
    Transpose(y.row(0), y.stride, n, width, to, stride);
  } else {
    for (int64_t i = 0; i < n; ++i) std::copy_n(y.row(i), width, to + i * stride);
  }
}

using Matrix = ffi::Buffer<ffi::F32, 2>;

ffi::Error Run(ffi::ThreadPool pool, Matrix coefficients, ffi::RemainingArgs xs,
               ffi::RemainingRets ys, ffi::Span<const int64_t> n_blocks) {
  if (n_blocks.size() != xs.size()) return ffi::Error::InvalidArgument("blocks of other matrices");
  std::vector<Block> blocks;
  for (size_t i = 0; i < xs.size(); ++i) {
    auto x = xs.get<Matrix>(i);
    auto y = ys.get<Matrix>(i);
    if (!x.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("not a matrix");
    const auto sizes = x->dimensions();
    const bool is_tall = sizes[0] > sizes[1];
    const int64_t length = is_tall ? sizes[1] : sizes[0];
    if (n_blocks[i] < 1 || length % n_blocks[i] != 0) {
      return ffi::Error::InvalidArgument("a matrix is not whole blocks");
    }
    const int64_t n = length / n_blocks[i];
    for (int64_t first = 0; first < length; first += n) {
      const int64_t start = is_tall ? first : first * sizes[1];
      blocks.push_back({x->typed_data() + start, (*y)->typed_data() + start,
                        is_tall ? sizes[0] : n, is_tall ? n : sizes[1], sizes[1], is_tall});
    }
  }
  if (blocks.empty()) return ffi::Error::Success();
  const int64_t n_all = blocks.size();
  const float* values = coefficients.typed_data();
  const int64_t n_polynomials = coefficients.dimensions()[0];
  RunPieces(pool, n_all, [=, blocks = std::move(blocks)](int64_t i) {
    Orthogonalize(values, n_polynomials, blocks[i]);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableOrthogonalize, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()  // coefficients, polynomials by 3
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("n_blocks"));
