// Vectors of float32, which the native kernels share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using composable::RunPieces;

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

}  // namespace
