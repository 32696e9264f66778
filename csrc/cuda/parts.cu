// Cross entropy of rows from parts of their classes, which other calls have summed (row_part.h): a thread merges the parts
// of a row and finishes it. It moves some doubles of each part of a row, and no logits.
#include "cross_entropy.cuh"

namespace softmax_ext {
namespace cuda {

inline namespace parts_cu {

constexpr int kPartThreads = 128;

template <typename Op>
__global__ void __launch_bounds__(kPartThreads) merge_parts(const __grid_constant__ Op op) {
  using T = typename Op::T;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x;
  const bool exists = number < op.rows;
  Totals share;
  if (exists) {
    Position at{};
    at.offset[kRow] = number;
    const RowPart of = merged_part(op, number);
    RowSums<T> sums;
    sums.weighted = static_cast<T>(of.weighted);
    sums.dot = static_cast<T>(of.dot);
    sums.b_sum = static_cast<T>(of.b_sum);
    sums.q_dot = static_cast<T>(of.q_dot);
    sums.q_sum = static_cast<T>(of.q_sum);
    Outcome<T> outcome;
    outcome.max = static_cast<T>(of.max);
    outcome.rest = of.max - of.max == 0 ? static_cast<T>(of.rest) : not_a_number<T>();  // without a finite maximum
    outcome.prediction = static_cast<int64_t>(of.argmax);
    op.finish(op.row(at), sums, outcome, static_cast<T>(of.target), true, share);
  }
  op.add_to_total(share, static_cast<unsigned>(number), exists);
}

}  // namespace parts_cu

template <typename T>
void cross_entropy_of_parts(const CrossEntropyParams<T>& params, const Layout& layout, const LossSum* sum,
                            Stream stream) {
  CrossEntropyParams<T> of_logits = params;  // a part has the target's logit, which is transformed already
  of_logits.options.softcap = 0;
  of_logits.options.logit_scale = 1;
  CrossEntropyOp<T, T, Kind::kAll> op = op_for<T, Kind::kAll>(of_logits, layout);
  prepare_total(op, sum, params.rows, stream);
  launch("merge_parts", merge_parts<decltype(op)>, {divide_up(params.rows, kPartThreads), kPartThreads}, stream, op);
}
template void cross_entropy_of_parts(const CrossEntropyParams<float>&, const Layout&, const LossSum*, Stream);
template void cross_entropy_of_parts(const CrossEntropyParams<double>&, const Layout&, const LossSum*, Stream);

}  // namespace cuda
}  // namespace softmax_ext
