// The table of one instruction set's kernels. It is compiled once for each set, as every *_kernel.cpp is.
#include "isa_kernels.h"

#define SOFTMAX_EXT_STRING_OF(name) #name
#define SOFTMAX_EXT_STRING(name) SOFTMAX_EXT_STRING_OF(name)

namespace softmax_ext {
namespace CPU_CAPABILITY {

extern const KernelTable table;
const KernelTable table = {
    SOFTMAX_EXT_STRING(CPU_CAPABILITY),
    {scratch_bytes, cross_entropy_float},
    {scratch_bytes, cross_entropy_double},
    {scratch_bytes, softmax_float},
    {scratch_bytes, softmax_double},
    {scratch_bytes, softmax_backward_float},
    {scratch_bytes, softmax_backward_double},
    scan_classes,
    scan_classes_u8,
    scale_rows,
    exp_float,
};

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
