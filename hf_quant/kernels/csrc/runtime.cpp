// What runs where: the choice of the variant, the threads, and their scratch memory.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "linear.h"

namespace hfq {
namespace {

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
};

std::atomic<bool> forked{false};

struct Choice {
  const Variant* variant;
  int32_t status;
};

// The best variant first; null where it was not compiled for this machine.
const Variant* variants(int i) {
  switch (i) {
#if defined(__x86_64__)
    case 0: return avx512_variant();
    case 1: return avx2_variant();
#else
    case 0: case 1: return nullptr;
#endif
    default: return portable_variant();
  }
}

bool runs_here(const Variant* v) {
  if (!v) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (v == avx512_variant()) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
  if (v == avx2_variant()) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return v == portable_variant();
}

Choice choose(const char* name) {
  const bool any = !name || !*name || !strcmp(name, "auto");
  bool known = any || !strcmp(name, "avx512") || !strcmp(name, "avx2");
  for (int i = 0; i < 3; ++i) {
    const Variant* v = variants(i);
    const bool named = v && !any && !strcmp(name, v->name);
    known = known || named;
    if ((any || named) && runs_here(v)) return {v, HFQ_OK};
  }
  return {nullptr, known ? HFQ_UNSUPPORTED_VARIANT : HFQ_UNKNOWN_VARIANT};
}

Choice& current() {
  static Choice choice = choose(getenv("HF_QUANT_NATIVE"));
  return choice;
}

#if defined(__unix__) || defined(__APPLE__)
__attribute__((constructor)) void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}
#endif

}  // namespace

const Variant* active_variant() { return current().variant; }

void parallel(int threads, void (*body)(int thread, int threads, void* data), void* data) {
#if defined(_OPENMP)
  if (threads > 1 && !forked.load(std::memory_order_relaxed) && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads(), data);
    return;
  }
#endif
  (void)threads;
  body(0, 1, data);
}

void barrier(int threads) {
  (void)threads;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp barrier
  }
#endif
}

void* scratch(size_t bytes) {
  static thread_local Scratch kept;
  if (bytes > kept.size) {
    free(kept.memory);
    kept.size = (bytes + 4095) & ~static_cast<size_t>(4095);
    kept.memory = aligned_alloc(64, kept.size);
    if (!kept.memory) {
      fprintf(stderr, "hf-quant: out of memory for %zu bytes of scratch space\n", kept.size);
      std::terminate();
    }
  }
  return kept.memory;
}

}  // namespace hfq

using namespace hfq;

const char* hfq_variant(void) { return current().variant ? current().variant->name : nullptr; }

int32_t hfq_status(void) { return current().status; }

int32_t hfq_set_variant(const char* name) {
  const Choice choice = choose(name);
  if (choice.variant) current() = choice;
  return choice.status;
}

const char* hfq_error(int32_t code) {
  switch (code) {
    case HFQ_OK: return "no error";
    case HFQ_BAD_WEIGHT: return "the weight's layout is not one that the kernels run";
    case HFQ_BAD_DTYPE: return "the dtype is none of float32, bfloat16 and float16";
    case HFQ_BAD_SHAPE: return "a shape, stride, row number or thread count is out of range";
    case HFQ_BAD_MODE: return "the mode is neither exact nor int8";
    case HFQ_UNKNOWN_VARIANT: return "HF_QUANT_NATIVE names no variant (choose avx512, avx2, portable or auto)";
    case HFQ_UNSUPPORTED_VARIANT: return "HF_QUANT_NATIVE names a variant that this CPU cannot run";
    case HFQ_NO_MEMORY: return "out of memory";
    default: return "unknown error";
  }
}

int32_t hfq_abi(void) { return HFQ_ABI; }
