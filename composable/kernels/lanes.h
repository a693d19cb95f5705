// Vectors of float32, and pieces of work for threads, which the native kernels share.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Compiled without contraction: whether a sum is fused may depend on nothing that is around it.
inline float MultiplyAdd(float x, float w, float sum) {
#if defined(FP_FAST_FMAF)
  return __builtin_fmaf(x, w, sum);
#else
  return x * w + sum;
#endif
}

inline Lanes MultiplyAdd(Lanes x, Lanes w, Lanes sum) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Lanes)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = MultiplyAdd(x[lane], w[lane], sum[lane]);
  return sum;
#endif
}

inline float Sum(Lanes lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)lanes);
#else
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
#endif
}

inline Lanes Spread(float value) { return value - Lanes{}; }

inline Lanes Load(const float* values) { return *reinterpret_cast<const Lanes*>(values); }
inline void Store(float* values, Lanes lanes) { *reinterpret_cast<Lanes*>(values) = lanes; }

// Returns memory of this thread for a panel; the system would clear new pages for every piece.
inline float* PanelOf(int64_t size) {
  thread_local std::vector<float> panel;
  if (panel.size() < static_cast<size_t>(size)) panel.resize(size);
  return panel.data();
}

// What threads share: each takes pieces until none is left. The caller takes part and waits for
// pieces that others have begun only, so it cannot wait for a thread that never starts.
template <typename Run>
struct Pieces {
  Run run;
  int64_t n_pieces;
  std::atomic<int64_t> next{0}, done{0};

  Pieces(Run run, int64_t n_pieces) : run(std::move(run)), n_pieces(n_pieces) {}

  void Work() {
    for (int64_t piece; (piece = next.fetch_add(1)) < n_pieces;) {
      run(piece);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

template <typename Run>
void RunPieces(ffi::ThreadPool& pool, int64_t n_pieces, Run run) {
  if (n_pieces <= 1) {
    run(0);
    return;
  }
  auto pieces = std::make_shared<Pieces<Run>>(std::move(run), n_pieces);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), n_pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([pieces] { pieces->Work(); });
  pieces->Work();
  while (pieces->done.load(std::memory_order_acquire) < n_pieces) std::this_thread::yield();
}

}  // namespace
