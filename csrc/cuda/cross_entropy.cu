// Launches cross entropy: which types, and whether the plain kernels do.
#include "cross_entropy.cuh"
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace cross_entropy_cu {

template <typename T>
Kind kind_for(const CrossEntropyParams<T>& p) {
  if (p.has_probabilities || sizeof(T) == 8) return Kind::kAll;
  const bool smoothing = p.options.label_smoothing != 0 && (p.forward || p.weight);
  const bool statistics = p.stats || p.grad_lse.given || p.grad_nll.given || p.grad_entropy.given;
  return smoothing || statistics || !LogitTransform(p.options).is_identity() ? Kind::kOptions : Kind::kPlain;
}

template <typename S, typename T, Kind kKind>
void launch_as(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  CrossEntropyOp<S, T, kKind> op{};
  static_cast<CrossEntropyParams<T>&>(op) = params;
  op.layout = device_layout(layout);
  op.reduces = params.forward;
  op.transform = LogitTransform(params.options);
  op.share = static_cast<T>(params.options.label_smoothing / static_cast<double>(layout.classes));
  const bool writes = params.grad_logits || params.grad_probabilities;
  const char* const name = kKind == Kind::kPlain ? "cross_entropy" : "cross_entropy with options";
  launch_op(name, op, layout, writes, sum, stream);
}

template <typename S, typename T>
void launch_typed(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  if constexpr (sizeof(S) > sizeof(T)) {
    throw std::logic_error("cross_entropy: float64 logits need arithmetic in double");
  } else {
    const Kind kind = kind_for(params);
    if constexpr (sizeof(T) == 4) {
      if (kind == Kind::kPlain) return launch_as<S, T, Kind::kPlain>(params, layout, sum, stream);
      if (kind == Kind::kOptions) return launch_as<S, T, Kind::kOptions>(params, layout, sum, stream);
    }
    launch_as<S, T, Kind::kAll>(params, layout, sum, stream);
  }
}

}  // namespace cross_entropy_cu

template <typename T>
void cross_entropy(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum, Stream stream) {
  visit_dtype<Halves>(params.logits_type, [&](auto element) {
    launch_typed<typename decltype(element)::Type>(params, layout, sum, stream);
  });
}
template void cross_entropy(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void cross_entropy(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

// A share of each unit and of each group, and a counter of each group. Units are rows, or blocks of at least kWarp rows.
template <typename T>
int64_t loss_scratch_bytes(const CrossEntropyParams<T>& params, const Layout& layout) {
  const int64_t most = most_in_thread(kind_for(params));
  const bool blocks = layout.kind == LayoutKind::kColumns && most > 0 && layout.classes <= most;
  const int64_t units = blocks ? layout.outer * (layout.inner / kWarp + 1) : layout.outer * layout.inner + kWarpBlock;
  const int64_t groups = units / total_group_size(units) + 2;
  return (units + groups) * static_cast<int64_t>(sizeof(Totals)) +
         (groups + 1) * static_cast<int64_t>(sizeof(unsigned));
}
template int64_t loss_scratch_bytes(const CrossEntropyParams<float>&, const Layout&);
template int64_t loss_scratch_bytes(const CrossEntropyParams<double>&, const Layout&);

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
