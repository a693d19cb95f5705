// What lies between the products of a SwiGLU block, `(silu(x g) * (x u)) d`, and its gradient, in
// float32, for XLA's foreign function interface.
//
// Matrices may have low-rank changes: `x g + (x a) b` for `x g`. Products with the matrices
// themselves are XLA's. Here their results get the changes, are gated, and give the gradients of the
// factors that are as wide as the block, in one pass over them.
//
// Threads take columns, so each sums over all tokens itself. Of those it does some at a time, which
// stay in cache from the first of these operations to the last.

#include "products.h"

namespace {

constexpr int kTokens = 32;  // at a time
constexpr int kAhead = 8;   // tokens between what is read and what is prefetched

// A matrix of some rows, and a piece of it of some columns.
inline Left Rows(const float* x, int64_t row, int64_t width) { return {x + row * width, width, 1}; }
inline Left Transposed(const float* x, int64_t row, int64_t width) {
  return {x + row * width, 1, width};
}

struct Sizes {
  int64_t tokens, width, rank;

  bool fit() const { return width % kLanes == 0; }
};

// Where the products with the matrices are, results follow.
struct Forward {
  const float *change_gate, *change_up;  // x a, tokens by rank
  const float *b_gate, *b_up;            // rank by width
  float *gate, *up, *hidden;             // tokens by width
};

void Gate(const Sizes& s, const Forward& f, int64_t column, int64_t columns) {
  for (int64_t first = 0; first < s.tokens; first += kTokens) {
    const int64_t rows = std::min<int64_t>(kTokens, s.tokens - first);
    const int64_t at = first * s.width + column;
    if (s.rank > 0) {
      Multiply<true>(Rows(f.change_gate, first, s.rank), {f.b_gate + column, kColumns, s.width},
                     s.rank, f.gate + at, s.width, rows, columns);
      Multiply<true>(Rows(f.change_up, first, s.rank), {f.b_up + column, kColumns, s.width}, s.rank,
                     f.up + at, s.width, rows, columns);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t i = at + row * s.width + j;
        const Lanes gate = Load(f.gate + i);
        Store(f.hidden + i, gate * Sigmoid(gate) * Load(f.up + i));
      }
    }
  }
}

struct Backward {
  const float *gate, *up;                // tokens by width
  const float *change_gate, *change_up;  // x a, tokens by rank
  const float* dchange_down;             // dy b^T, tokens by rank
  const float* a_down;                   // width by rank
  float *dgate, *dup, *hidden;           // tokens by width; dgate has dy d^T, hidden may be null
  float *db_gate, *db_up;                // rank by width
  float* da_down;                        // width by rank
};

void Differentiate(const Sizes& s, const Backward& p, int64_t column, int64_t columns) {
  // The piece of a_down transposed, the sums of its gradient, and what is hidden of some tokens.
  float* a = PanelOf((2 * s.rank + kTokens) * kColumns);
  float* da = a + s.rank * kColumns;
  float* hidden = da + s.rank * kColumns;
  std::fill_n(da, s.rank * kColumns, 0.0f);
  if (s.rank > 0) TransposeToPanels(p.a_down + column * s.rank, s.rank, columns, s.rank, a);
  for (int64_t r = 0; r < s.rank; ++r) {
    std::fill_n(p.db_gate + r * s.width + column, columns, 0.0f);
    std::fill_n(p.db_up + r * s.width + column, columns, 0.0f);
  }
  for (int64_t first = 0; first < s.tokens; first += kTokens) {
    const int64_t rows = std::min<int64_t>(kTokens, s.tokens - first);
    const int64_t at = first * s.width + column;
    if (s.rank > 0) {
      Multiply<true>(Rows(p.dchange_down, first, s.rank), {a, kColumns, kColumns}, s.rank,
                     p.dgate + at, s.width, rows, columns);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t i = at + row * s.width + j, ahead = i + kAhead * s.width;
        __builtin_prefetch(p.gate + ahead), __builtin_prefetch(p.up + ahead);
        __builtin_prefetch(p.dgate + ahead), __builtin_prefetch(p.dup + ahead, 1);
        const Lanes gate = Load(p.gate + i), up = Load(p.up + i), dhidden = Load(p.dgate + i);
        // silu'(g) = s + g s (1 - s) = s + silu(g) (1 - s), with s = sigmoid(g).
        const Lanes sigmoid = Sigmoid(gate), silu = gate * sigmoid;
        Store(p.dgate + i, dhidden * up * MultiplyAdd(silu, 1.0f - sigmoid, sigmoid));
        Store(p.dup + i, dhidden * silu);
        Store(p.hidden ? p.hidden + i : hidden + row * kColumns + j, silu * up);
      }
    }
    if (s.rank > 0) {
      Multiply<true>(Transposed(p.dchange_down, first, s.rank), {hidden, kColumns, kColumns}, rows,
                     da, kColumns, s.rank, columns);
      Multiply<true>(Transposed(p.change_gate, first, s.rank), {p.dgate + at, kColumns, s.width},
                     rows, p.db_gate + column, s.width, s.rank, columns);
      Multiply<true>(Transposed(p.change_up, first, s.rank), {p.dup + at, kColumns, s.width}, rows,
                     p.db_up + column, s.width, s.rank, columns);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t r = 0; r < s.rank; ++r) {
      p.da_down[(column + j) * s.rank + r] = da[r * kColumns + j];
    }
  }
}

template <typename Run>
ffi::Error RunColumns(ffi::ThreadPool& pool, const Sizes& s, Run run) {
  if (!s.fit()) return ffi::Error::InvalidArgument("the width does not fit the processor");
  RunPieces(pool, (s.width + kColumns - 1) / kColumns, [=](int64_t piece) {
    const int64_t column = piece * kColumns;
    run(column, std::min<int64_t>(kColumns, s.width - column));
  });
  return ffi::Error::Success();
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::ResultBuffer<ffi::F32, 2>;

Sizes SizesOf(const Matrix& wide, const Matrix& change) {
  return {wide.dimensions()[0], wide.dimensions()[1], change.dimensions()[1]};
}

// The results `gate` and `up` have the memory of the products that they are made of.
ffi::Error RunForward(ffi::ThreadPool pool, Matrix product_gate, Matrix product_up,
                      Matrix change_gate, Matrix change_up, Matrix b_gate, Matrix b_up, Result gate,
                      Result up, Result hidden) {
  const Sizes s = SizesOf(product_gate, change_gate);
  const Forward f{change_gate.typed_data(), change_up.typed_data(), b_gate.typed_data(),
                  b_up.typed_data(),        gate->typed_data(),     up->typed_data(),
                  hidden->typed_data()};
  return RunColumns(pool, s, [=](int64_t column, int64_t columns) { Gate(s, f, column, columns); });
}

// The result `dgate` has the memory of `dhidden`.
ffi::Error RunBackward(ffi::ThreadPool pool, Matrix gate, Matrix up, Matrix dhidden,
                       Matrix change_gate, Matrix change_up, Matrix dchange_down, Matrix a_down,
                       Result dgate, Result dup, Result hidden, Result db_gate, Result db_up,
                       Result da_down) {
  const Sizes s = SizesOf(gate, change_gate);
  const Backward p{gate.typed_data(),
                   up.typed_data(),
                   change_gate.typed_data(),
                   change_up.typed_data(),
                   dchange_down.typed_data(),
                   a_down.typed_data(),
                   dgate->typed_data(),
                   dup->typed_data(),
                   hidden->element_count() > 0 ? hidden->typed_data() : nullptr,
                   db_gate->typed_data(),
                   db_up->typed_data(),
                   da_down->typed_data()};
  return RunColumns(
      pool, s, [=](int64_t column, int64_t columns) { Differentiate(s, p, column, columns); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableGate, RunForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()    // x g
                                  .Arg<Matrix>()    // x u
                                  .Arg<Matrix>()    // x a_gate
                                  .Arg<Matrix>()    // x a_up
                                  .Arg<Matrix>()    // b_gate
                                  .Arg<Matrix>()    // b_up
                                  .Ret<Matrix>()    // gate
                                  .Ret<Matrix>()    // up
                                  .Ret<Matrix>());  // hidden

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableGateBackward, RunBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()    // gate
                                  .Arg<Matrix>()    // up
                                  .Arg<Matrix>()    // dy d^T
                                  .Arg<Matrix>()    // x a_gate
                                  .Arg<Matrix>()    // x a_up
                                  .Arg<Matrix>()    // dy b_down^T
                                  .Arg<Matrix>()    // a_down
                                  .Ret<Matrix>()    // dgate
                                  .Ret<Matrix>()    // dup
                                  .Ret<Matrix>()    // hidden, or empty
                                  .Ret<Matrix>()    // db_gate
                                  .Ret<Matrix>()    // db_up
                                  .Ret<Matrix>());  // da_down
