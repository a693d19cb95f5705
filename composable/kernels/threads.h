// Pieces of work for threads, which the native kernels share.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

// One copy for all kernels, so that what one of them called is there for the next.
namespace composable {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns the processor that this thread runs on, or -1.
inline int FindProcessor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread off a processor, if it may run on others. Linux starts a thread where the one
// that woke it runs, and may let both share that processor for milliseconds while another is idle.
inline void LeaveProcessor(int processor) {
#if defined(__linux__)
  cpu_set_t all, others;
  if (processor < 0 || sched_getaffinity(0, sizeof(all), &all) != 0) return;
  others = all;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0) {
    sched_setaffinity(0, sizeof(all), &all);
  }
#endif
}

// What threads share: each takes pieces until none is left. The caller takes part and waits for
// pieces that others have begun only, so it cannot wait for a thread that never starts.
class Pieces {
 public:
  explicit Pieces(int64_t n_pieces) : n_pieces_(n_pieces) {}
  virtual ~Pieces() = default;

  // Where the caller runs, which a helper is no help.
  const int processor = FindProcessor();

  void Work() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < n_pieces_;) {
      Run(piece);
      n_done_.fetch_add(1, std::memory_order_release);
    }
  }

  void Wait() const {
    constexpr int kPauses = 1000;  // then another thread may need this processor to end its piece
    for (int i = 0; n_done_.load(std::memory_order_acquire) < n_pieces_; ++i) {
      if (i < kPauses) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  virtual void Run(int64_t piece) = 0;

  const int64_t n_pieces_;
  std::atomic<int64_t> next_{0}, n_done_{0};
};

// Threads of XLA's pool that may stay for a moment after they helped, and look for more to do:
// products of one row follow one another within microseconds, and waking a thread takes as long as
// many of them do. While they stay they take part in nothing else.
class Helpers {
 public:
  using Duration = std::chrono::microseconds;

  static Helpers& Get() {
    static Helpers* helpers = new Helpers;  // threads may outlive what is destroyed at exit
    return *helpers;
  }

  // Lets `n` threads work on pieces, first those that stayed.
  void Call(xla::ffi::ThreadPool& pool, const std::shared_ptr<Pieces>& pieces, int64_t n,
            Duration stay) {
    const int64_t n_here = n_staying_.load(std::memory_order_acquire);
    if (n_here > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      latest_ = pieces;
      n_calls_.fetch_add(1, std::memory_order_release);
    }
    for (int64_t i = n_here; i < n; ++i) {
      pool.Schedule([this, pieces, stay]() mutable { Help(std::move(pieces), stay); });
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kPauses = 16;  // between two looks at the clock

  void Help(std::shared_ptr<Pieces> pieces, Duration stay) {
    n_staying_.fetch_add(1, std::memory_order_acq_rel);
    int64_t n_seen = n_calls_.load(std::memory_order_acquire);
    for (; pieces; pieces = Await(n_seen, stay)) {
      if (FindProcessor() == pieces->processor) LeaveProcessor(pieces->processor);
      pieces->Work();
    }
    n_staying_.fetch_sub(1, std::memory_order_acq_rel);
  }

  // Returns what was called for since, or null if nothing comes. Looks once at least: another caller
  // counted on this thread while it was busy.
  std::shared_ptr<Pieces> Await(int64_t& n_seen, Duration stay) {
    const auto end = Clock::now() + stay;
    do {
      for (int i = 0; i < kPauses; ++i, Pause()) {
        if (n_calls_.load(std::memory_order_acquire) == n_seen) continue;
        std::lock_guard<std::mutex> lock(mutex_);
        n_seen = n_calls_.load(std::memory_order_relaxed);
        return latest_;
      }
    } while (Clock::now() < end);
    return nullptr;
  }

  std::atomic<int64_t> n_staying_{0}, n_calls_{0};
  std::mutex mutex_;
  std::shared_ptr<Pieces> latest_;
};

template <typename Body>
class PiecesOf final : public Pieces {
 public:
  PiecesOf(Body body, int64_t n_pieces) : Pieces(n_pieces), body_(std::move(body)) {}

 private:
  void Run(int64_t piece) override { body_(piece); }

  Body body_;
};

// Runs pieces on the threads of a pool, each of which stays as long afterwards for the next ones.
template <typename Body>
void RunPieces(xla::ffi::ThreadPool& pool, int64_t n_pieces, Body body,
               Helpers::Duration stay = Helpers::Duration(0)) {
  if (n_pieces <= 1) {
    body(0);
    return;
  }
  auto pieces = std::make_shared<PiecesOf<Body>>(std::move(body), n_pieces);
  Helpers::Get().Call(pool, pieces, std::min<int64_t>(pool.num_threads(), n_pieces) - 1, stay);
  pieces->Work();
  pieces->Wait();
}

}  // namespace composable
