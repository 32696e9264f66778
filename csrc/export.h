// The mark of the functions that Python calls by ctypes; all others are hidden.
#pragma once

#define SOFTMAX_EXT_EXPORT extern "C" __attribute__((visibility("default")))
