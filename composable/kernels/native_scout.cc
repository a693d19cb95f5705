// The cross entropy of a scout's classes, `gelu(x w_in + b_in) w_out + b_out`, with its gradient, in
// float32, for XLA's foreign function interface.
//
// Threads take pieces of the tokens. Of those each does some at a time, of which hidden units,
// logits and softmax stay in cache over all products that they are in. Every piece sums the
// gradients of the weights itself; the sums are added in the order of the pieces, so that no bit
// depends on the number of threads.

#include <cmath>

#include "products.h"

namespace {

constexpr int64_t kTokens = 48;  // at a time, a multiple of kRows
// Tokens of a piece, at least: the sums of all pieces are added in the end.
constexpr int64_t kPiece = 128, kMostPieces = 8;

// Of classes that only fill a vector: far below any other, and finite with another one subtracted.
constexpr float kNoLogit = -1e38f;
// Of the approximation of gelu by tanh.
constexpr float kGeluScale = 0.7978845608f, kGeluCubed = 0.044715f;

// Rows as long as the classes are filled to whole vectors, and are no power of two apart, or all of
// them would share the same few lines of the first cache.
struct Sizes {
  int64_t tokens, features, width, classes;

  int64_t pieces() const { return std::clamp<int64_t>(tokens / kPiece, 1, kMostPieces); }
  int64_t columns() const { return RoundUp(classes, kLanes); }
  int64_t stride() const { return RoundUp(classes, kColumns) + kLanes; }
  // Numbers of panels that are as wide as the hidden units, and as the classes.
  int64_t width_panels(int64_t rows) const { return rows * RoundUp(width, kColumns); }
  int64_t class_panels() const { return width * RoundUp(classes, kColumns); }
  // Of the gradients: rows for the features and a bias, and rows for the hidden units and a bias.
  int64_t sums_in() const { return (features + 1) * width; }
  int64_t sums() const { return sums_in() + (width + 1) * stride(); }
};

struct Arrays {
  const float* x;               // tokens by features
  const float *w_in, *b_in;     // features by width, width
  const float *w_out, *b_out;   // width by classes, classes
  const int32_t* classes;       // of each token
  float* nats;                  // of each token
  float *dw_in, *db_in, *dw_out, *db_out;
  // The weights in panels, those of the classes transposed as well, and the sums of the pieces.
  float *in, *out, *transposed, *sums;
};

// Copies a matrix in panels of `kColumns` columns; those beyond its own are zero.
void FillPanels(const float* from, int64_t rows, int64_t columns, float* panels) {
  for (int64_t column = 0; column < columns; column += kColumns) {
    const int64_t n = std::min<int64_t>(kColumns, columns - column);
    for (int64_t row = 0; row < rows; ++row, panels += kColumns) {
      std::copy_n(from + row * columns + column, n, panels);
      std::fill(panels + n, panels + kColumns, 0.0f);
    }
  }
}

// Returns sigmoid(2 u) of gelu(x) = x sigmoid(2 u), as its approximation by tanh has it.
inline Lanes GeluGate(Lanes x) {
  const Lanes cubed = x * x * x;
  return Sigmoid(MultiplyAdd(cubed, Spread(2 * kGeluScale * kGeluCubed), x * (2 * kGeluScale)));
}

// Makes the gradients of a token's logits of them, and returns its loss.
float Differentiate(const Sizes& s, int32_t target, float* logit) {
  Lanes most = Load(logit);
  for (int64_t j = kLanes; j < s.columns(); j += kLanes) {
    const Lanes x = Load(logit + j);
    most = most > x ? most : x;
  }
  float largest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  const float below = largest - logit[target];
  Lanes total = {};
  for (int64_t j = 0; j < s.columns(); j += kLanes) {
    const Lanes e = Exp(Load(logit + j) - largest);
    Store(logit + j, e);
    total += e;
  }
  const float sum = Sum(total), factor = 1.0f / sum;
  for (int64_t j = 0; j < s.columns(); j += kLanes) Store(logit + j, Load(logit + j) * factor);
  logit[target] -= 1.0f;
  return below + std::log(sum);
}

void AddTo(float* sum, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) Store(sum + i, Load(sum + i) + Load(x + i));
}

void RunPiece(const Sizes& s, const Arrays& p, int64_t piece) {
  const int64_t stride = s.stride(), width = s.width;
  float* before = PanelOf(kTokens * (3 * width + stride));  // what gelu is taken of
  float *hidden = before + kTokens * width, *dhidden = hidden + kTokens * width;
  float* logits = dhidden + kTokens * width;
  float *dw_in = p.sums + piece * s.sums(), *db_in = dw_in + s.features * width;
  float *dw_out = dw_in + s.sums_in(), *db_out = dw_out + width * stride;
  std::fill_n(dw_in, s.sums(), 0.0f);
  const int64_t begin = piece * s.tokens / s.pieces(), end = (piece + 1) * s.tokens / s.pieces();
  for (int64_t first = begin; first < end; first += kTokens) {
    const int64_t rows = std::min(kTokens, end - first);
    const float* x = p.x + first * s.features;
    for (int64_t row = 0; row < rows; ++row) std::copy_n(p.b_in, width, before + row * width);
    Multiply<true>({x, s.features, 1}, {p.in, s.features * kColumns, kColumns}, s.features, before,
                   width, rows, width);
    for (int64_t i = 0; i < rows * width; i += kLanes) {
      Store(hidden + i, Load(before + i) * GeluGate(Load(before + i)));
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* logit = logits + row * stride;
      std::copy_n(p.b_out, s.classes, logit);
      std::fill(logit + s.classes, logit + s.columns(), kNoLogit);
    }
    Multiply<true>({hidden, width, 1}, {p.out, width * kColumns, kColumns}, width, logits, stride,
                   rows, s.columns());
    for (int64_t row = 0; row < rows; ++row) {
      float* logit = logits + row * stride;
      p.nats[first + row] = Differentiate(s, p.classes[first + row], logit);
      AddTo(db_out, logit, s.columns());
    }
    Multiply<true>({hidden, 1, width}, {logits, kColumns, stride}, rows, dw_out, stride, width,
                   s.columns());
    Multiply({logits, stride, 1}, {p.transposed, s.classes * kColumns, kColumns}, s.classes,
             dhidden, width, rows, width);
    for (int64_t i = 0; i < rows * width; i += kLanes) {
      const Lanes y = Load(before + i), gate = GeluGate(y);
      // x sigmoid(2 u) differentiated, with u = scale (x + cubed x^3).
      const Lanes du =
          MultiplyAdd(y * y, Spread(6 * kGeluScale * kGeluCubed), Spread(2 * kGeluScale));
      Store(dhidden + i, Load(dhidden + i) * MultiplyAdd(y * gate * (1.0f - gate), du, gate));
    }
    for (int64_t row = 0; row < rows; ++row) AddTo(db_in, dhidden + row * width, width);
    Multiply<true>({x, 1, s.features}, {dhidden, kColumns, width}, rows, dw_in, width, s.features,
                   width);
  }
}

// Adds what the pieces found for one row of weights, or for biases: first those of the features.
void AddPieces(const Sizes& s, const Arrays& p, int64_t row) {
  const int64_t row_out = row - (s.features + 1);
  const bool is_in = row_out < 0;
  const int64_t n = is_in ? s.width : s.classes;
  float* to = row < s.features    ? p.dw_in + row * n
              : is_in             ? p.db_in
              : row_out < s.width ? p.dw_out + row_out * n
                                  : p.db_out;
  const float* from = p.sums + (is_in ? row * n : s.sums_in() + row_out * s.stride());
  std::copy_n(from, n, to);
  for (int64_t piece = 1; piece < s.pieces(); ++piece) {
    for (int64_t j = 0; j < n; ++j) to[j] += from[piece * s.sums() + j];
  }
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using Classes = ffi::Buffer<ffi::S32, 1>;

ffi::Error Run(ffi::ThreadPool pool, Matrix x, Matrix w_in, Vector b_in, Matrix w_out, Vector b_out,
               Classes classes, ffi::Result<Vector> nats, ffi::Result<Matrix> dw_in,
               ffi::Result<Vector> db_in, ffi::Result<Matrix> dw_out, ffi::Result<Vector> db_out) {
  const Sizes s{x.dimensions()[0], x.dimensions()[1], w_out.dimensions()[0],
                w_out.dimensions()[1]};
  if (s.width % kLanes != 0) return ffi::Error::InvalidArgument("the width does not fit");
  const int32_t* numbers = classes.typed_data();
  if (std::any_of(numbers, numbers + s.tokens, [=](int32_t i) { return i < 0 || i >= s.classes; })) {
    return ffi::Error::InvalidArgument("a token's class is not among the weights'");
  }
  thread_local std::vector<float> memory;  // for the calls that follow, too
  const int64_t in = s.width_panels(s.features), transposed = s.width_panels(s.classes);
  const int64_t panels = in + s.class_panels() + transposed;
  memory.resize(std::max<size_t>(memory.size(), panels + s.pieces() * s.sums()));
  float* free = memory.data();
  const Arrays p{x.typed_data(),
                 w_in.typed_data(),
                 b_in.typed_data(),
                 w_out.typed_data(),
                 b_out.typed_data(),
                 numbers,
                 nats->typed_data(),
                 dw_in->typed_data(),
                 db_in->typed_data(),
                 dw_out->typed_data(),
                 db_out->typed_data(),
                 free,
                 free + in,
                 free + in + s.class_panels(),
                 free + panels};
  FillPanels(p.w_in, s.features, s.width, p.in);
  FillPanels(p.w_out, s.width, s.classes, p.out);
  TransposeToPanels(p.w_out, s.classes, s.width, s.classes, p.transposed);
  RunPieces(pool, s.pieces(), [=](int64_t piece) { RunPiece(s, p, piece); });
  RunPieces(pool, s.features + s.width + 2, [=](int64_t row) { AddPieces(s, p, row); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableScoutLoss, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()    // features of tokens
                                  .Arg<Matrix>()    // w_in
                                  .Arg<Vector>()    // b_in
                                  .Arg<Matrix>()    // w_out
                                  .Arg<Vector>()    // b_out
                                  .Arg<Classes>()   // of each token
                                  .Ret<Vector>()    // nats
                                  .Ret<Matrix>()    // dw_in
                                  .Ret<Vector>()    // db_in
                                  .Ret<Matrix>()    // dw_out
                                  .Ret<Vector>());  // db_out
