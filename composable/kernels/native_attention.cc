// Causal grouped-query attention over whole rows of text and its gradient, and to cached positions,
// in float32, for XLA's foreign function interface.
//
// One head of one row at a time, one tile of queries after the other, against the keys up to its
// end. Scores stay in a core's cache: they are made again for the gradient from the logarithm of
// each softmax's sum (Dao et al. 2022, arXiv:2205.14135, appendix B.4). Heads of queries that share
// a key head are computed each for itself, so no two threads write to the same numbers.

#include <cmath>

#include "products.h"

namespace {

constexpr int kQueries = 32;  // of a tile

struct Sizes {
  int64_t batch, positions, heads, key_heads, width;

  Sizes(ffi::Span<const int64_t> q, ffi::Span<const int64_t> k)
      : batch(q[0]), positions(q[1]), heads(q[2]), key_heads(k[2]), width(q[3]) {}

  bool fit() const { return width % kLanes == 0 && heads % key_heads == 0; }
  int64_t stride() const { return heads * width; }          // between positions of queries
  int64_t key_stride() const { return key_heads * width; }  // and of keys
  int64_t padded() const { return RoundUp(positions, kColumns); }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
};

// Where one head of one row begins, in queries and in keys.
struct Head {
  int64_t query, key;

  Head(const Sizes& s, int64_t item) {
    const int64_t row = item / s.heads, head = item % s.heads;
    query = row * s.positions * s.stride() + head * s.width;
    key = row * s.positions * s.key_stride() + head / (s.heads / s.key_heads) * s.width;
  }
};

// Queries of one head in a row, and the keys up to the last of them; what lies between two positions.
struct Rows {
  const float* q;
  int64_t q_stride;
  const float *k, *v;
  int64_t k_stride;
  float* y;  // as q
  int64_t first, positions, width;  // position of the first query, number of queries

  int64_t keys() const { return first + positions; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
};

// Makes scores of keys up to one into weights that are to be divided by their sum, which it returns,
// and those of the other columns into zeros.
float Weigh(float* score, int64_t keys, int64_t columns, float scale, float& most) {
  std::fill(score + keys, score + columns, -INFINITY);
  Lanes largest = Load(score);
  for (int64_t j = kLanes; j < columns; j += kLanes) {
    const Lanes next = Load(score + j);
    largest = next > largest ? next : largest;
  }
  most = largest[0];
  for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Store(score + j, Exp((Load(score + j) - most) * scale));
  }
  std::fill(score + keys, score + columns, 0.0f);
  Lanes total = {};
  for (int64_t j = 0; j < columns; j += kLanes) total += Load(score + j);
  return Sum(total);
}

// Logarithms of the softmaxes' sums are written where there is room for them.
void Attend(const Rows& r, float* log) {
  const int64_t padded = RoundUp(r.keys(), kColumns);
  float* keys = PanelOf(padded * (r.width + kQueries));
  float* scores = keys + padded * r.width;
  TransposeToPanels(r.k, r.k_stride, r.keys(), r.width, keys);
  for (int64_t begin = 0; begin < r.positions; begin += kQueries) {
    const int64_t rows = std::min<int64_t>(kQueries, r.positions - begin);
    const int64_t end = r.first + begin + rows, columns = RoundUp(end, kLanes);
    Multiply({r.q + begin * r.q_stride, r.q_stride, 1}, {keys, r.width * kColumns, kColumns},
             r.width, scores, columns, rows, columns);
    float totals[kQueries];
    for (int64_t row = 0; row < rows; ++row) {
      float most;
      totals[row] = Weigh(scores + row * columns, r.first + begin + row + 1, columns, r.scale(), most);
      if (log) log[begin + row] = most * r.scale() + std::log(totals[row]);
    }
    float* out = r.y + begin * r.q_stride;
    Multiply({scores, columns, 1}, {r.v, kColumns, r.k_stride}, end, out, r.q_stride, rows, r.width);
    for (int64_t row = 0; row < rows; ++row) {
      const float inverse = 1.0f / totals[row];
      for (int64_t h = 0; h < r.width; h += kLanes) {
        float* at = out + row * r.q_stride + h;
        Store(at, Load(at) * inverse);
      }
    }
  }
}

// The same for one query, for which keys are not worth transposing.
void AttendOne(const Rows& r) {
  const int64_t columns = RoundUp(r.keys(), kLanes);
  float* scores = PanelOf(columns);
  for (int64_t j = 0; j < r.keys(); ++j) {
    const float* key = r.k + j * r.k_stride;
    Lanes sum = {};
    for (int64_t h = 0; h < r.width; h += kLanes) {
      sum = MultiplyAdd(Load(r.q + h), Load(key + h), sum);
    }
    scores[j] = Sum(sum);
  }
  float most;
  const float inverse = 1.0f / Weigh(scores, r.keys(), columns, r.scale(), most);
  for (int64_t h = 0; h < r.width; h += kLanes) {
    Lanes sum = {};
    for (int64_t j = 0; j < r.keys(); ++j) {
      sum = MultiplyAdd(Spread(scores[j]), Load(r.v + j * r.k_stride + h), sum);
    }
    Store(r.y + h, sum * inverse);
  }
}

struct Gradients {
  float *dq, *dk, *dv;  // by heads of queries
};

void Differentiate(const Sizes& s, int64_t item, const float* q, const float* k, const float* v,
                   const float* y, const float* log, const float* dy, Gradients out) {
  const Head head(s, item);
  q += head.query, y += head.query, dy += head.query, k += head.key, v += head.key;
  float *dq = out.dq + head.query, *dk = out.dk + head.query, *dv = out.dv + head.query;
  log += item * s.positions;
  float* keys = PanelOf(s.padded() * 2 * (s.width + kQueries));
  float* values = keys + s.padded() * s.width;
  float* ps = values + s.padded() * s.width;
  float* ds = ps + s.padded() * kQueries;
  TransposeToPanels(k, s.key_stride(), s.positions, s.width, keys);
  TransposeToPanels(v, s.key_stride(), s.positions, s.width, values);
  for (int64_t row = 0; row < s.positions; ++row) {
    std::fill_n(dk + row * s.stride(), s.width, 0.0f);
    std::fill_n(dv + row * s.stride(), s.width, 0.0f);
  }
  for (int64_t first = 0; first < s.positions; first += kQueries) {
    const int64_t end = std::min(s.positions, first + kQueries), rows = end - first;
    const int64_t columns = RoundUp(end, kLanes), begin = first * s.stride();
    const Right by_width{nullptr, s.width * kColumns, kColumns};
    Multiply({q + begin, s.stride(), 1}, {keys, by_width.panel, by_width.term}, s.width, ps,
             columns, rows, columns);
    Multiply({dy + begin, s.stride(), 1}, {values, by_width.panel, by_width.term}, s.width, ds,
             columns, rows, columns);
    for (int64_t row = 0; row < rows; ++row) {
      Lanes products = {};
      for (int64_t h = 0; h < s.width; h += kLanes) {
        const int64_t at = begin + row * s.stride() + h;
        products += Load(y + at) * Load(dy + at);
      }
      const float mean = Sum(products), own = log[first + row], scale = s.scale();
      float *p = ps + row * columns, *d = ds + row * columns;
      const int64_t n = first + row + 1;
      for (int64_t j = 0; j < n; j += kLanes) {
        const Lanes e = Exp(Load(p + j) * scale - own);
        Store(p + j, e);
        Store(d + j, e * (Load(d + j) - mean) * scale);
      }
      std::fill(p + n, p + columns, 0.0f);
      std::fill(d + n, d + columns, 0.0f);
    }
    Multiply({ds, columns, 1}, {k, kColumns, s.key_stride()}, end, dq + begin, s.stride(), rows,
             s.width);
    Multiply<true>({ds, 1, columns}, {q + begin, kColumns, s.stride()}, rows, dk, s.stride(), end,
                   s.width);
    Multiply<true>({ps, 1, columns}, {dy + begin, kColumns, s.stride()}, rows, dv, s.stride(), end,
                   s.width);
  }
}

using Array = ffi::Buffer<ffi::F32, 4>;
using Sums = ffi::Buffer<ffi::F32, 3>;
using Result = ffi::ResultBuffer<ffi::F32, 4>;
using Position = ffi::Buffer<ffi::S32, 0>;
using SumsResult = ffi::ResultBuffer<ffi::F32, 3>;

ffi::Error RunForward(ffi::ThreadPool pool, Array q, Array k, Array v, Result y,
                      SumsResult log) {
  const Sizes s(q.dimensions(), k.dimensions());
  if (!s.fit()) return ffi::Error::InvalidArgument("heads are not of a width that fits");
  RunPieces(pool, s.batch * s.heads, [=, q = q.typed_data(), k = k.typed_data(),
                                      v = v.typed_data(), y = y->typed_data(),
                                      log = log->typed_data()](int64_t item) {
    const Head head(s, item);
    Attend({q + head.query, s.stride(), k + head.key, v + head.key, s.key_stride(), y + head.query,
            0, s.positions, s.width},
           log + item * s.positions);
  });
  return ffi::Error::Success();
}

// Multiplications of scores for a thread that is worth waking.
constexpr int64_t kWorkOfHead = 1 << 16;

ffi::Error RunCached(ffi::ThreadPool pool, Array q, Array k, Array v, Position first, Result y) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t positions = of_q[1], heads = of_q[2], width = of_q[3];
  const int64_t key_heads = of_k[1], room = of_k[2];
  const int64_t begin = *first.typed_data();
  if (width % kLanes || heads % key_heads) {
    return ffi::Error::InvalidArgument("heads are not of a width that fits");
  }
  if (begin < 0 || begin + positions > room) {
    return ffi::Error::InvalidArgument("positions are not in the cache");
  }
  const auto run = [=, q = q.typed_data(), k = k.typed_data(), v = v.typed_data(),
                    y = y->typed_data()](int64_t item) {
    const int64_t row = item / heads, head = item % heads;
    const int64_t query = row * positions * heads * width + head * width;
    const int64_t key = (row * key_heads + head / (heads / key_heads)) * room * width;
    const Rows rows{q + query, heads * width, k + key, v + key, width, y + query,
                    begin, positions, width};
    positions == 1 ? AttendOne(rows) : Attend(rows, nullptr);
  };
  const int64_t n_items = of_q[0] * heads;
  if (positions * (begin + positions) * width < kWorkOfHead) {
    for (int64_t item = 0; item < n_items; ++item) run(item);
  } else {
    RunPieces(pool, n_items, run);
  }
  return ffi::Error::Success();
}

ffi::Error RunBackward(ffi::ThreadPool pool, Array q, Array k, Array v, Array y,
                       Sums log, Array dy, Result dq, Result dk, Result dv) {
  const Sizes s(q.dimensions(), k.dimensions());
  if (!s.fit()) return ffi::Error::InvalidArgument("heads are not of a width that fits");
  const Gradients out{dq->typed_data(), dk->typed_data(), dv->typed_data()};
  RunPieces(pool, s.batch * s.heads, [=, q = q.typed_data(), k = k.typed_data(),
                                      v = v.typed_data(), y = y.typed_data(),
                                      log = log.typed_data(), dy = dy.typed_data()](int64_t item) {
    Differentiate(s, item, q, k, v, y, log, dy, out);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableAttend, RunForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()                        // q
                                  .Arg<Array>()                        // k
                                  .Arg<Array>()                        // v
                                  .Ret<Array>()                        // y
                                  .Ret<Sums>());   // log

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableAttendCached, RunCached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()     // q
                                  .Arg<Array>()     // k, heads before positions
                                  .Arg<Array>()     // v
                                  .Arg<Position>()  // of the first query
                                  .Ret<Array>());   // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableAttendBackward, RunBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()                        // q
                                  .Arg<Array>()                        // k
                                  .Arg<Array>()                        // v
                                  .Arg<Array>()                        // y
                                  .Arg<Sums>()     // log
                                  .Arg<Array>()                        // dy
                                  .Ret<Array>()                        // dq
                                  .Ret<Array>()                        // dk, by heads of queries
                                  .Ret<Array>());                      // dv, by heads of queries
