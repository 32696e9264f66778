// Cross entropy with options.
#include "cross_entropy_launch.cuh"

namespace softmax_ext {
namespace cuda {

template void launch_kind<Kind::kOptions>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);

}  // namespace cuda
}  // namespace softmax_ext
