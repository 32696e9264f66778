// Cross entropy with options, with probability targets, and in double.
#include "cross_entropy.cuh"

namespace softmax_ext {
namespace cuda {

template void launch_kind<Kind::kOptions>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void launch_kind<Kind::kAll>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void launch_kind<Kind::kAll>(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

}  // namespace cuda
}  // namespace softmax_ext
