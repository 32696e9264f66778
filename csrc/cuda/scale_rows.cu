// The scaling of a gradient that is there already, as an Op of the row kernels (Op: op.cuh).
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

template <typename T>
struct Factor {
  T factor;
};

template <typename S, typename Arithmetic = std::conditional_t<sizeof(S) == 8, double, float>>
struct ScaleOp : SimpleOp<Factor<Arithmetic>> {
  using In = S;
  using Out = S;
  using T = Arithmetic;
  using Row = Factor<T>;
  using Sums = Sum<T>;
  static constexpr int kInputs = 1, kOutputOperand = 0, kKeptChunks = 0, kStreamedChunks = 4;
  static constexpr bool kMaximum = false, reduces = false;

  struct Coefficients {};

  DeviceLayout layout;
  ScaleRowsParams params;

  // One factor for all rows, and that is 1.
  DEVICE bool is_done() const { return params.factor.stride == 0 && factor_of(0) == 1; }
  DEVICE T factor_of(int64_t row) const {
    return load_value<T>(params.factor.data, params.factor.dtype, row * params.factor.stride);
  }

  SOFTMAX_EXT_INLINE static int input_operand(int) { return 0; }
  SOFTMAX_EXT_INLINE S* output() const { return static_cast<S*>(params.data); }
  SOFTMAX_EXT_INLINE const S* input(int) const { return output(); }
  DEVICE Row row(const Position& at) const { return {factor_of(at.offset[kRow])}; }
  template <typename Chunk>
  DEVICE void add(Sums&, T, const Row&, const Chunk&, int, int) const {}
  DEVICE Coefficients finish(const Row&, const Sums&, const Outcome<T>&, T, bool, Totals&) const { return {}; }
  // A gradient of 0 stays 0, whatever the factor: that of an ignored row has no part in the loss.
  template <typename Chunk, int n>
  DEVICE void compute(const Row& row, const Coefficients&, const Chunk& held, int, int, T (&values)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) values[i] = multiply_or_zero(held.at(i).of[0], row.factor);
  }
};

template <typename S>
void launch_typed(const ScaleRowsParams& params, const Layout& layout, Stream stream) {
  ScaleOp<S> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("scale_rows", op, layout, true, nullptr, stream);
}

void scale_rows(const ScaleRowsParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.dtype,
                      [&](auto element) { launch_typed<typename decltype(element)::Type>(params, layout, stream); });
}

}  // namespace cuda
}  // namespace softmax_ext
