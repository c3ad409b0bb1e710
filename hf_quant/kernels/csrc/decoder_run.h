// Internal interface of the fused decoder: one call's buffers, and one thread's view of them.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdlib>

#include "decoder_abi.h"
#include "glue.h"
#include "linear.h"

namespace hfq {

// Some ten microseconds: the others are nearly always there by then. Where they are not, the machine is busy with other
// processes, and a thread that kept spinning would only use up the time that the scheduler has for its own team.
constexpr int kSpins = 1000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads meet here 150 times for a token of a small model. OpenMP's barrier may put them to sleep (and does under
// OMP_WAIT_POLICY=PASSIVE), which takes longer than the work between two of them.
class Meeting {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// 64-byte aligned memory that only grows.
struct Arena {
  char* memory = nullptr;
  size_t size = 0;
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { free(memory); }
  bool reserve(size_t bytes) {
    if (bytes <= size) return true;
    free(memory);
    size = (bytes + 4095) & ~static_cast<size_t>(4095);
    memory = static_cast<char*>(aligned_alloc(64, size));
    if (!memory) size = 0;
    return memory != nullptr;
  }
};

inline size_t padded(int64_t bytes) { return (static_cast<size_t>(bytes) + 127) & ~static_cast<size_t>(127); }

// From this many new tokens on the threads share the norms and the conversion of activations, which costs them two more
// meetings per product; below, each does all of it for itself.
constexpr int64_t kSharedTokens = 16;

// One call.
struct Run {
  const hfq_decoder* d;
  const hfq_step* s;
  const Variant* variant;
  const Glue* glue;
  int64_t tokens;                // rows times new tokens
  const int64_t* first;          // [rows]: the first token that may be attended to
  const uint8_t* const* keep;    // [rows]: nullptr, or a byte per token
  char *x, *qkv, *attended, *gate, *up, *y;  // [tokens] rows each, in the dtype of the model
  char* normed;                  // likewise, when the threads share the norms
  Activations* activations;      // likewise
  std::atomic<int64_t> next{0};  // of the blocks of queries
  std::atomic<bool> failed{false};
  Meeting meeting;
};

// Runs all layers as thread `thread` of `threads`.
void decode_share(Run& run, int thread, int threads);

}  // namespace hfq
