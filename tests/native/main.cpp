// The kernels of csrc/cpu without torch: every instruction set that this processor has, called from several threads on
// shared inputs, against the formulas in double.
//
//   native_kernels [TRIALS [SEED]]     runs TRIALS trials of each kind for each instruction set; status 1 if any failed
//   native_kernels --fault NAME        does what must not be done (faults.cpp); status 0 if nothing stopped it
//   native_kernels --readable ...      the same, where the pages around operands may be read (guarded.h)
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/dispatch.h"
#include "trial.h"

using namespace softmax_ext;

namespace {

struct Kind {
  const char* name;
  void (*attempt)(native::Random&);
};

constexpr Kind kKinds[] = {
    {"cross_entropy", native::try_cross_entropy}, {"softmax", native::try_softmax},
    {"backward", native::try_softmax_backward},   {"scale_rows", native::try_scale_rows},
    {"scan_and_exp", native::try_scan_and_exp},
};

void run_trials(const char* isa, int64_t trials, uint64_t seed) {
  for (const Kind& kind : kKinds)
    for (int64_t i = 0; i < trials; i++) {
      const uint64_t own = seed + i;  // of a trial, so that it can be repeated alone
      native::Random random(own);
      native::trial = native::text(isa, ", seed ", own, ": ");
      kind.attempt(random);
    }
}

#ifndef __SANITIZE_ADDRESS__  // which reports it itself
// Says in which trial a guarded page was touched, and dies of it.
void name_trial(int signal) {
  std::fprintf(stderr, "signal %d in %s\n", signal, native::trial.c_str());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}
#endif

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "--readable") {
    native::Guarded::readable_pages = true;
    count--, arguments++;
  }
  if (count == 3 && std::string(arguments[1]) == "--fault") {
    native::commit_fault(arguments[2]);
    return 0;
  }
#ifndef __SANITIZE_ADDRESS__
  std::signal(SIGSEGV, name_trial);
#endif
  const int64_t trials = count > 1 ? std::atoll(arguments[1]) : 100;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  int isas = 0;
  const char* const* const names = compiled_isas(&isas);
  std::string tried;
  for (int i = 0; i < isas; i++) {
    if (!select_isa(names[i])) continue;
    run_trials(names[i], trials, seed);
    tried += native::text(" ", names[i]);
  }
  native::try_block_cache();
  std::printf("%lld trials of each kernel on%s, and the block cache: %d failures\n", static_cast<long long>(trials),
              tried.c_str(), native::failures);
  return native::failures == 0 ? 0 : 1;
}
