// What Python asks the CPU library, by ctypes: how it was built, and which kernel set is used. Functions of C, so that
// the library needs no Python and serves every version of it (softmax_ext/libraries.py). Texts belong to the library.
#pragma once

#include <cstdint>

#include "export.h"

SOFTMAX_EXT_EXPORT const char* softmax_ext_cpu_built_torch();
SOFTMAX_EXT_EXPORT const char* softmax_ext_cpu_compiler();

// The compiled instruction set of that index, weakest first; null past the last.
SOFTMAX_EXT_EXPORT const char* softmax_ext_cpu_compiled_isa(int32_t index);

// Whether this processor runs the compiled set of that name.
SOFTMAX_EXT_EXPORT bool softmax_ext_cpu_isa_available(const char* isa);

SOFTMAX_EXT_EXPORT const char* softmax_ext_cpu_selected_isa();

// Uses this one from now on. False if it was not compiled or cannot run here.
SOFTMAX_EXT_EXPORT bool softmax_ext_cpu_select_isa(const char* isa);

// The kernels' exponential of each of n values x <= 0; for the test of its error.
SOFTMAX_EXT_EXPORT void softmax_ext_cpu_exp_nonpositive(const float* x, float* y, int64_t n);
