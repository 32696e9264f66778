// Cross entropy without options; and what kernel it would take, for reports.
#include "cross_entropy_launch.cuh"

namespace softmax_ext {
namespace cuda {

template void launch_kind<Kind::kPlain>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);

std::string kernel_for(int64_t classes, DType type, bool keeps) {
  const int bytes = static_cast<int>(size_of(type));
  using Plain = CrossEntropyOp<float, float, Kind::kPlain>;
  const LayoutKind kind = classes > kSmallClasses ? LayoutKind::kRows : LayoutKind::kColumns;
  const int chunks = bytes == 8 ? 0 : Plain::kKeptChunks;
  const Choice choice = choose_for<Plain>(
      {kind, classes, bytes, chunks, Plain::kKeptThreads, bytes == 8 ? 0 : Plain::kMostInThread, keeps, true},
      current_device());
  std::string name = name_of(choice.kernel);
  return choice.kernel == Kernel::kCluster ? name + " of " + std::to_string(choice.cluster) : name;
}

}  // namespace cuda
}  // namespace softmax_ext
