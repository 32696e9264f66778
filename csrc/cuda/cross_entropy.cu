// Cross entropy: which kind of kernels a call needs, and what it must be given for the sum of the losses.
#include "cross_entropy.cuh"

namespace softmax_ext {
namespace cuda {

// In cross_entropy_options.cu, which is compiled beside this unit.
extern template void launch_kind<Kind::kOptions>(const CrossEntropyParams<float>&, const Layout&, const LossSum*,
                                                 Stream);
extern template void launch_kind<Kind::kAll>(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
extern template void launch_kind<Kind::kAll>(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

template <typename T>
Kind kind_for(const CrossEntropyParams<T>& p) {
  if (p.has_probabilities || sizeof(T) == 8) return Kind::kAll;
  const bool smoothing = p.options.label_smoothing != 0 && (p.forward || p.weight);
  const bool by_probability = p.forward && p.options.weighs_by_probability;
  const bool statistics = p.stats || p.grad_lse.given || p.grad_nll.given || p.grad_entropy.given;
  return smoothing || by_probability || statistics || p.part || p.z_factor || !LogitTransform(p.options).is_identity()
             ? Kind::kOptions
             : Kind::kPlain;
}

template <typename T>
void cross_entropy(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  const Kind kind = kind_for(params);
  if constexpr (sizeof(T) == 4) {
    if (kind == Kind::kPlain) return launch_kind<Kind::kPlain>(params, layout, sum, stream);
    if (kind == Kind::kOptions) return launch_kind<Kind::kOptions>(params, layout, sum, stream);
  }
  launch_kind<Kind::kAll>(params, layout, sum, stream);
}
template void cross_entropy(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void cross_entropy(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

// A share of each unit and of each group, and a counter of each group. Units are rows, or blocks of at least kWarp rows.
template <typename T>
int64_t loss_scratch_bytes(const CrossEntropyParams<T>& params, const Layout& layout) {
  const int64_t most = most_in_thread(kind_for(params));
  const bool blocks = layout.kind == LayoutKind::kColumns && most > 0 && layout.classes <= most;
  const int64_t units = blocks ? layout.outer * (layout.inner / kWarp + 1) : layout.outer * layout.inner + 4;
  const int64_t groups = total_group_size(units);  // of fewer units too: a group's size is no less than their number
  return (units + groups) * static_cast<int64_t>(sizeof(Totals)) +
         (groups + 1) * static_cast<int64_t>(sizeof(unsigned));
}
template int64_t loss_scratch_bytes(const CrossEntropyParams<float>&, const Layout&);
template int64_t loss_scratch_bytes(const CrossEntropyParams<double>&, const Layout&);

std::string kernel_for(int64_t classes, DType type) {
  const int bytes = static_cast<int>(size_of(type));
  using Plain = CrossEntropyOp<float, float, Kind::kPlain>;
  const LayoutKind kind = classes > kSmallClasses ? LayoutKind::kRows : LayoutKind::kColumns;
  const int chunks = bytes == 8 ? 0 : Plain::kKeptChunks;
  const Choice choice = choose_for<Plain>(
      {kind, classes, bytes, chunks, Plain::kKeptThreads, bytes == 8 ? 0 : Plain::kMostInThread, true, true},
      current_device());
  constexpr const char* kNames[] = {"thread", "warp", "block", "cluster", "stream", "lanes"};  // in Kernel's order
  const std::string name = kNames[static_cast<int>(choice.kernel)];
  return choice.kernel == Kernel::kCluster ? name + " of " + std::to_string(choice.cluster) : name;
}

}  // namespace cuda
}  // namespace softmax_ext
