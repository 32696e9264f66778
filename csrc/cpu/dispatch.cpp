// The table of the kernel sets that were compiled, and the one in use.
#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace softmax_ext {

namespace DEFAULT {
extern const KernelTable table;
}
#ifdef SOFTMAX_EXT_WITH_AVX2
namespace AVX2 {
extern const KernelTable table;
}
#endif
#ifdef SOFTMAX_EXT_WITH_AVX512
namespace AVX512 {
extern const KernelTable table;
}
#endif

namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*available)();
};

bool always() { return true; }

// The same features that torch asks for before it uses its own units compiled for these sets.
#ifdef SOFTMAX_EXT_WITH_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#ifdef SOFTMAX_EXT_WITH_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
#endif

const Isa kIsas[] = {
    {"DEFAULT", &DEFAULT::table, always},
#ifdef SOFTMAX_EXT_WITH_AVX2
    {"AVX2", &AVX2::table, has_avx2},
#endif
#ifdef SOFTMAX_EXT_WITH_AVX512
    {"AVX512", &AVX512::table, has_avx512},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<const KernelTable*> selected{&DEFAULT::table};

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0) return &isa;
  return nullptr;
}

}  // namespace

const KernelTable& kernels() { return *selected.load(std::memory_order_relaxed); }

const char* const* compiled_isas(int* count) {
  static const char* const names[] = {
      "DEFAULT",
#ifdef SOFTMAX_EXT_WITH_AVX2
      "AVX2",
#endif
#ifdef SOFTMAX_EXT_WITH_AVX512
      "AVX512",
#endif
  };
  *count = kIsaCount;
  return names;
}

bool isa_available(const char* name) {
  const Isa* isa = find(name);
  return isa && isa->available();
}

bool select_isa(const char* name) {
  if (!isa_available(name)) return false;
  selected.store(find(name)->table, std::memory_order_relaxed);
  return true;
}

}  // namespace softmax_ext
