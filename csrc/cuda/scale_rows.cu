// The scaling of a gradient that is there already, as an Op of the row kernels (Op: rows.cuh).
#include "dispatch.cuh"

namespace softmax_ext {
namespace cuda {

// Not without a name: nvcc would name it after the folder, and the library would have other bytes in another.
inline namespace scale_rows_cu {

template <typename S>
struct ScaleOp : SimpleOp<std::conditional_t<sizeof(S) == 8, double, float>> {
  using In = S;
  using Out = S;
  using T = std::conditional_t<sizeof(S) == 8, double, float>;
  using Sums = Sum<T>;
  static constexpr int kInputs = 1, kOutputOperand = 0;
  static constexpr bool kMaximum = false, reduces = false;
  static constexpr int kTwoPassChunks = 4, kRegisterChunks = 0;
  static constexpr ColumnShape kColumns = sizeof(T) == 8 ? ColumnShape{8, 8} : ColumnShape{16, 16};

  struct Context {
    T factor;
  };
  struct Coefficients {};

  DeviceLayout layout;
  ScaleRowsParams params;

  // One factor for all rows, and that is 1.
  __device__ __forceinline__ bool is_noop() const { return params.factor.stride == 0 && factor_of(0) == 1; }
  __device__ __forceinline__ T factor_of(int64_t row) const {
    return load_value<T>(params.factor.data, params.factor.dtype, row * params.factor.stride);
  }

  __device__ __forceinline__ static int input_operand(int) { return 0; }
  __device__ __forceinline__ S* output(const Position& at) const { return static_cast<S*>(params.data) + at.offset[0]; }
  __device__ __forceinline__ const S* input(int, const Position& at) const { return output(at); }
  __device__ __forceinline__ Context fetch(const Position& at) const { return {factor_of(at.offset[kRow])}; }
  __device__ __forceinline__ void add(Sums&, const Context&, const Elements<ScaleOp>&, int) const {}
  __device__ __forceinline__ Coefficients finish(const Context&, const Sums&, bool) const { return {}; }
  // A gradient of 0 stays 0, whatever the factor: that of an ignored row has no part in the loss.
  __device__ __forceinline__ T value(const Context& context, const Coefficients&, const Elements<ScaleOp>& x,
                                     int) const {
    return multiply_or_zero(x.of[0], context.factor);
  }
};

template <typename S>
void launch_typed(const ScaleRowsParams& params, const Layout& layout, Stream stream) {
  ScaleOp<S> op{};
  op.layout = device_layout(layout);
  op.params = params;
  launch_op("scale_rows", op, layout, true, stream);
}

}  // namespace scale_rows_cu

void scale_rows(const ScaleRowsParams& params, const Layout& layout, Stream stream) {
  visit_dtype<Halves>(params.dtype,
                      [&](auto element) { launch_typed<typename decltype(element)::Type>(params, layout, stream); });
}

}  // namespace cuda
}  // namespace softmax_ext
