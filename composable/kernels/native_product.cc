// Products of rows of float32 with a matrix, for XLA's foreign function interface.
//
// A matrix is int8, with one scale for each output, bfloat16 or float32. It is widened to float32 in
// registers, or in a panel that stays in cache, and never in memory. Each output is one sum over the
// inputs in their order (or one for each lane of a register, if the outputs are the matrix's rows),
// so it does not depend on how many rows there are, on the others, or on the number of threads.
//
// Weights are read once for every token, so the speed of memory is the limit. Where the processor
// does not prefetch by itself, as in many virtual machines, prefetching here triples the speed.

#include <chrono>

#include "lanes.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float WidenOne(float value) { return value; }
inline float WidenOne(int8_t value) { return value; }
inline float WidenOne(BFloat16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline Lanes Widen(const float* values) { return Load(values); }

template <typename T>
inline Lanes Widen(const T* values) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 1) {
    return (Lanes)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
  } else {
    return (Lanes)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))), 16);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 1) {
    return (Lanes)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
  } else {
    return (Lanes)_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))), 16);
  }
#else
  Lanes wide;
  for (int lane = 0; lane < kLanes; ++lane) wide[lane] = WidenOne(values[lane]);
  return wide;
#endif
}

// One product: y = (x w) scale, or (x w^T) scale. Scales are null for none.
template <typename T>
struct Product {
  const float* x;  // rows by inputs
  const T* w;      // inputs by outputs; outputs by inputs if it is transposed
  const float* scale;
  float* y;  // rows by outputs
  int64_t rows, inputs, outputs;

  float scaled(float sum, int64_t output) const { return scale ? sum * scale[output] : sum; }
};

constexpr int kInputs = 8;  // rows of the matrix that are added to the outputs at a time
constexpr int kFew = 4;     // rows for which they are
// Rows that share what was loaded of a panel, and registers that a panel is wide: their sums fill
// most registers, so that a loaded number is used several times.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif
constexpr int kParts = 3;
constexpr int kPanel = kParts * kLanes;  // outputs of a panel
constexpr int kSquare = 4;  // rows, and outputs, of a tile of a product with a transposed matrix
constexpr int64_t kAhead = 12 << 10;  // bytes between what is read and what is prefetched

// Adds what one number of the matrix adds to an output of each row.
template <int kRows, typename T>
inline void AddOne(const Product<T>& p, int64_t d, int64_t f) {
  const float wide = WidenOne(p.w[d * p.outputs + f]);
  for (int row = 0; row < kRows; ++row) {
    float& y = p.y[row * p.outputs + f];
    y = MultiplyAdd(p.x[row * p.inputs + d], wide, y);
  }
}

// Few rows: adds `kInputs` rows of the matrix to the outputs at a time, which stay in cache.
template <int kRows, typename T>
void MultiplyFew(const Product<T>& p, int64_t begin, int64_t end) {
  const int64_t width = (end - begin) * sizeof(T);
  const int64_t rows_ahead = std::max<int64_t>(1, kAhead / (width * kInputs)) * kInputs;
  for (int row = 0; row < kRows; ++row) {
    std::fill(p.y + row * p.outputs + begin, p.y + row * p.outputs + end, 0.0f);
  }
  int64_t d = 0;
  for (; d + kInputs <= p.inputs; d += kInputs) {
    const T* w = p.w + d * p.outputs;
    const float* x = p.x + d;
    int64_t f = begin;
    for (; f + kLanes <= end; f += kLanes) {
      if ((f - begin) * sizeof(T) % 64 < kLanes * sizeof(T)) {
        for (int k = 0; k < kInputs; ++k) {
          __builtin_prefetch(w + (rows_ahead + k) * p.outputs + f);
        }
      }
      Lanes sum[kRows];
      for (int row = 0; row < kRows; ++row) sum[row] = Load(p.y + row * p.outputs + f);
#pragma GCC unroll 8
      for (int k = 0; k < kInputs; ++k) {
        const Lanes wide = Widen(w + k * p.outputs + f);
        for (int row = 0; row < kRows; ++row) {
          sum[row] = MultiplyAdd(Spread(x[row * p.inputs + k]), wide, sum[row]);
        }
      }
      for (int row = 0; row < kRows; ++row) Store(p.y + row * p.outputs + f, sum[row]);
    }
    for (; f < end; ++f) {
      for (int k = 0; k < kInputs; ++k) AddOne<kRows>(p, d + k, f);
    }
  }
  for (; d < p.inputs; ++d) {
    for (int64_t f = begin; f < end; ++f) AddOne<kRows>(p, d, f);
  }
  if (p.scale) {
    for (int row = 0; row < kRows; ++row) {
      float* y = p.y + row * p.outputs;
      for (int64_t f = begin; f < end; ++f) y[f] = p.scaled(y[f], f);
    }
  }
}

// Several rows and a panel of outputs, which is widened once.
template <int kRows>
void MultiplyPanel(const float* x, int64_t inputs, const float* panel, Lanes* sums) {
  Lanes sum[kRows][kParts] = {};
  for (int64_t d = 0; d < inputs; ++d) {
    Lanes w[kParts];
    for (int part = 0; part < kParts; ++part) w[part] = Load(panel + d * kPanel + part * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Lanes own = Spread(x[row * inputs + d]);
      for (int part = 0; part < kParts; ++part) {
        sum[row][part] = MultiplyAdd(own, w[part], sum[row][part]);
      }
    }
  }
  std::memcpy(sums, sum, sizeof(sum));
}

template <typename T>
void MultiplyRows(const Product<T>& p, int64_t begin, int64_t end) {
  float* panel = PanelOf(p.inputs * kPanel);
  Lanes sums[kTile * kParts];
  for (int64_t first = begin; first < end; first += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, end - first);
    for (int64_t d = 0; d < p.inputs; ++d) {
      const T* w = p.w + d * p.outputs + first;
      __builtin_prefetch(w + 2 * kInputs * p.outputs);
      float* wide = panel + d * kPanel;
      int64_t f = 0;
      for (; f + kLanes <= width; f += kLanes) Store(wide + f, Widen(w + f));
      for (; f < width; ++f) wide[f] = WidenOne(w[f]);
    }
    for (int64_t row = 0; row < p.rows;) {
      const float* x = p.x + row * p.inputs;
      int n_rows = 1;
      if (row + kTile <= p.rows) {
        n_rows = kTile;
        MultiplyPanel<kTile>(x, p.inputs, panel, sums);
      } else if (row + kTile / 2 <= p.rows) {
        n_rows = kTile / 2;
        MultiplyPanel<kTile / 2>(x, p.inputs, panel, sums);
      } else {
        MultiplyPanel<1>(x, p.inputs, panel, sums);
      }
      const float* sum = reinterpret_cast<const float*>(sums);
      for (int i = 0; i < n_rows; ++i) {
        float* y = p.y + (row + i) * p.outputs + first;
        for (int64_t f = 0; f < width; ++f) y[f] = p.scaled(sum[i * kPanel + f], first + f);
      }
      row += n_rows;
    }
  }
}

// Rows of x by `kSquare` rows of a transposed matrix, whose inputs are `W`.
template <int kRows, typename W>
void MultiplyTransposedTile(const float* x, int64_t stride, const W* w, int64_t inputs, bool is_ahead,
                            float (*sums)[kSquare]) {
  Lanes sum[kRows][kSquare] = {};
  for (int64_t d = 0; d + kLanes <= inputs; d += kLanes) {
    Lanes wide[kSquare];
    for (int k = 0; k < kSquare; ++k) {
      const W* values = w + k * inputs + d;
      if (is_ahead && d * sizeof(W) % 64 < kLanes * sizeof(W)) {
        __builtin_prefetch(reinterpret_cast<const char*>(values) + kAhead / 2);
      }
      wide[k] = Widen(values);
    }
    for (int row = 0; row < kRows; ++row) {
      const Lanes own = Load(x + row * stride + d);
      for (int k = 0; k < kSquare; ++k) sum[row][k] = MultiplyAdd(own, wide[k], sum[row][k]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kSquare; ++k) {
      float total = Sum(sum[row][k]);
      for (int64_t d = inputs - inputs % kLanes; d < inputs; ++d) {
        total = MultiplyAdd(x[row * stride + d], WidenOne(w[k * inputs + d]), total);
      }
      sums[row][k] = total;
    }
  }
}

template <typename T>
void MultiplyTransposed(const Product<T>& p, int64_t begin, int64_t end) {
  float* panel = PanelOf(kSquare * p.inputs);
  float sums[kSquare][kSquare];
  for (int64_t first = begin; first < end; first += kSquare) {
    const T* w = p.w + first * p.inputs;
    const int64_t height = std::min<int64_t>(kSquare, end - first);
    // Rows of the panel beyond the height are multiplied as well, and not used.
    const bool is_wide = p.rows > 1 || height < kSquare;
    if (is_wide) {
      for (int64_t i = 0; i < height * p.inputs; ++i) panel[i] = WidenOne(w[i]);
    }
    for (int64_t row = 0; row < p.rows;) {
      const bool is_tile = row + kSquare <= p.rows;
      const int n_rows = is_tile ? kSquare : 1;
      const float* x = p.x + row * p.inputs;
      if (is_tile) {
        MultiplyTransposedTile<kSquare>(x, p.inputs, panel, p.inputs, false, sums);
      } else if (is_wide) {
        MultiplyTransposedTile<1>(x, p.inputs, panel, p.inputs, false, sums);
      } else {
        MultiplyTransposedTile<1>(x, p.inputs, w, p.inputs, true, sums);
      }
      for (int i = 0; i < n_rows; ++i) {
        for (int64_t k = 0; k < height; ++k) {
          p.y[(row + i) * p.outputs + first + k] = p.scaled(sums[i][k], first + k);
        }
      }
      row += n_rows;
    }
  }
}

// A piece for another thread takes ten times as long as to call it: few rows' reads this many
// bytes of the matrix, and more rows multiply this many weights.
constexpr int64_t kBytesOfPiece = 96 << 10;
constexpr int64_t kWorkOfPiece = 1 << 20;
// With more threads, each would wait for memory, and look for more to do in between.
constexpr int64_t kMostThreads = 16;
// Between two products of a token there is attention at most.
constexpr std::chrono::microseconds kStay{100};
// Few rows' piece reads as many bytes of each of the matrix's rows, so that they are whole lines.
constexpr int64_t kBytesOfRow = 256;

template <typename T>
int64_t CountPieces(const Product<T>& p, bool is_transposed, int64_t n_threads) {
  const int64_t weights = p.inputs * p.outputs, bytes = weights * sizeof(T);
  if (p.rows > kFew || (p.rows > 1 && is_transposed)) return p.rows * weights / kWorkOfPiece;
  const int64_t most = std::min({bytes / kBytesOfPiece, n_threads, kMostThreads});
  return is_transposed ? most : std::min<int64_t>(most, p.outputs * sizeof(T) / kBytesOfRow);
}

template <typename T>
void Multiply(ffi::ThreadPool& pool, const Product<T>& p, bool is_transposed) {
  const int64_t units = (p.outputs + kPanel - 1) / kPanel;
  const int64_t n_pieces =
      std::clamp<int64_t>(CountPieces(p, is_transposed, pool.num_threads()), 1, units);
  const auto run = [=](int64_t piece) {
    const int64_t begin = units * piece / n_pieces * kPanel;
    const int64_t end = std::min(p.outputs, units * (piece + 1) / n_pieces * kPanel);
    if (is_transposed) {
      MultiplyTransposed(p, begin, end);
    } else if (p.rows == 1) {
      MultiplyFew<1>(p, begin, end);
    } else if (p.rows == 2) {
      MultiplyFew<2>(p, begin, end);
    } else if (p.rows == 3) {
      MultiplyFew<3>(p, begin, end);
    } else if (p.rows == 4) {
      MultiplyFew<4>(p, begin, end);
    } else {
      MultiplyRows(p, begin, end);
    }
  };
  RunPieces(pool, n_pieces, run, p.rows <= kFew ? kStay : kStay * 0);
}

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
               ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y, bool is_transposed) {
  const auto sizes = w.dimensions();
  const int64_t inputs = sizes[is_transposed ? 1 : 0], outputs = sizes[is_transposed ? 0 : 1];
  const int64_t rows = x.dimensions()[0];
  const float* scales = scale.element_count() ? scale.typed_data() : nullptr;
  if (y->element_count() == 0) return ffi::Error::Success();
  const auto multiply = [&](auto kept) {
    using T = decltype(kept);
    Multiply(pool,
             Product<T>{x.typed_data(), static_cast<const T*>(w.untyped_data()), scales,
                        y->typed_data(), rows, inputs, outputs},
             is_transposed);
    return ffi::Error::Success();
  };
  switch (w.element_type()) {
    case ffi::S8:
      return multiply(int8_t{});
    case ffi::U16:  // bits of bfloat16
      return multiply(BFloat16{});
    case ffi::F32:
      return multiply(float{});
    default:
      return ffi::Error::InvalidArgument("the matrix is not int8, bits of bfloat16, or float32");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ComposableMultiply, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x
                                  .Arg<ffi::AnyBuffer>()         // w
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scale, empty for none
                                  .Ret<ffi::Buffer<ffi::F32>>()  // y
                                  .Attr<bool>("is_transposed"));
