// See cpu_questions.h. No torch header is included here.
#include "cpu_questions.h"

#include "cpu/dispatch.h"

const char* softmax_ext_cpu_built_torch() { return SOFTMAX_EXT_BUILT_TORCH; }

const char* softmax_ext_cpu_compiler() { return SOFTMAX_EXT_COMPILER; }

const char* softmax_ext_cpu_compiled_isa(int32_t index) {
  int count = 0;
  const char* const* names = softmax_ext::compiled_isas(&count);
  return 0 <= index && index < count ? names[index] : nullptr;
}

bool softmax_ext_cpu_isa_available(const char* isa) { return softmax_ext::isa_available(isa); }

const char* softmax_ext_cpu_selected_isa() { return softmax_ext::kernels().isa; }

bool softmax_ext_cpu_select_isa(const char* isa) { return softmax_ext::select_isa(isa); }

void softmax_ext_cpu_exp_nonpositive(const float* x, float* y, int64_t n) { softmax_ext::kernels().exp_float(x, y, n); }
