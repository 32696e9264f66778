// Which of the compiled instruction sets is used. The choice follows the running machine as torch sees it (Python
// passes torch's own capability at import) and can be forced, so that one machine tests every path it can run.
#pragma once

#include "kernel_table.h"

namespace softmax_ext {

// The kernels in use.
const KernelTable& kernels();

// Names of the compiled sets, weakest first; `count` of them.
const char* const* compiled_isas(int* count);

// Switches to the set named `isa` ("DEFAULT", "AVX2", "AVX512"). False if it was not compiled or this processor
// cannot run it.
bool select_isa(const char* isa);

// Whether this processor can run the compiled set named `isa`.
bool isa_available(const char* isa);

}  // namespace softmax_ext
