// Trials of softmax, its backward, and the small kernels, against the formulas in double.
#include <memory>
#include <vector>

#include "groups.h"
#include "trial.h"

namespace softmax_ext::native {
namespace {

template <typename K>
void run_split(const K& k) {
  run_groups(k, Groups(k.layout), [&](const auto& kernel, int64_t, int64_t begin, int64_t end, void* scratch) {
    kernel.run(k, begin, end, scratch);
  });
}

void run_split(const ScaleRows& k) {
  Groups(k.layout).run(0, [&](int64_t, int64_t begin, int64_t end, void*) { kernels().scale_rows(k, begin, end); });
}

// Runs call(caller, output) for every caller at once and returns the first one's output, which all must have.
template <typename Call>
std::unique_ptr<Operand> run_callers(const Shape& shape, DType type, int64_t gap, bool at_end, const Call& call) {
  std::vector<std::unique_ptr<Operand>> outputs;
  for (int k = 0; k < kCallers; k++) outputs.push_back(std::make_unique<Operand>(shape, type, gap, at_end));
  at_once(kCallers, [&](int k) {
    threads_of_caller = k + 1;
    call(*outputs[k]);
  });
  for (int k = 1; k < kCallers; k++) expect_same(outputs[0]->memory(), outputs[k]->memory(), "output");
  if (!outputs[0]->gaps_untouched()) fail("a gap between rows is written");
  return std::move(outputs[0]);
}

struct Exact {
  double max, log_sum;
};

Exact reduce(const Operand& input, int64_t row) {
  const int64_t classes = input.shape().classes;
  int64_t argmax = 0;
  for (int64_t c = 1; c < classes; c++)
    if (input.get(row, c) > input.get(row, argmax)) argmax = c;
  const double max = input.get(row, argmax);
  double rest = 0;  // without the largest, which is 1
  for (int64_t c = 0; c < classes; c++) rest += c == argmax ? 0 : std::exp(input.get(row, c) - max);
  return {max, std::log1p(rest)};
}

template <typename T>
void try_softmax_as(Random& random, const Operand& input, DType output_type, int64_t gap, bool at_end) {
  const bool log = random.one_in(2), non_temporal = random.one_in(2);
  trial += text(log ? " log" : "", non_temporal ? " non-temporal" : "");
  const Shape& shape = input.shape();
  const auto output = run_callers(shape, output_type, gap, at_end, [&](Operand& out) {
    const JoinedLayout layout({&input, &out});
    run_split(Softmax<T>{{log, input.data(), input.type(), out.data(), output_type}, {layout, non_temporal}});
  });
  for (int64_t row = 0; row < shape.rows(); row++) {
    const Exact exact = reduce(input, row);
    for (int64_t c = 0; c < shape.classes; c++) {
      const double d = input.get(row, c) - exact.max, value = log ? d - exact.log_sum : std::exp(d - exact.log_sum);
      // The argument's rounding is relative to the distance from the maximum.
      const double size = log ? std::abs(value) : value == 0 ? 0 : value * (1 + std::abs(d));
      expect<T>(output->get(row, c), value, output_type, size, "output", row, c);
    }
  }
}

template <typename T>
void try_softmax_backward_as(Random& random, const Operand& grad, const Operand& output, DType grad_input_type,
                             int64_t gap, bool at_end, bool log) {
  const bool non_temporal = random.one_in(2);
  trial += text(log ? " log" : "", non_temporal ? " non-temporal" : "");
  const Shape& shape = grad.shape();
  const auto result = run_callers(shape, grad_input_type, gap, at_end, [&](Operand& out) {
    const JoinedLayout layout({&out, &output, &grad});
    run_split(SoftmaxBackward<T>{{log, grad.data(), output.data(), output.type(), out.data(), grad_input_type},
                                 {layout, non_temporal}});
  });
  for (int64_t row = 0; row < shape.rows(); row++) {
    double sum = 0, size = 0;
    for (int64_t c = 0; c < shape.classes; c++) {
      const double term = grad.get(row, c) * (log ? 1 : output.get(row, c));
      sum += term;
      size += std::abs(term);
    }
    for (int64_t c = 0; c < shape.classes; c++) {
      const double g = grad.get(row, c), y = output.get(row, c), p = log ? std::exp(y) : y;
      expect<T>(result->get(row, c), log ? g - p * sum : p * (g - sum), grad_input_type,
                log ? std::abs(g) + p * size : p * (std::abs(g) + size), "gradient", row, c);
    }
  }
}

void fill_normal(Random& random, Operand& operand, double scale) {
  for (int64_t row = 0; row < operand.shape().rows(); row++)
    for (int64_t c = 0; c < operand.shape().classes; c++) operand.set(row, c, scale * random.normal());
}

}  // namespace

void try_softmax(Random& random) {
  const Shape shape = random.shape();
  const DType input_type = random.dtype(), output_type = random.one_in(2) ? input_type : random.dtype();
  const int64_t gap = random.pick<int64_t>({0, 0, 3});
  const bool at_end = random.one_in(2);
  trial += text("softmax of ", text_of(shape), " ", name_of(input_type), " to ", name_of(output_type), " gap ", gap,
                at_end ? " at the end" : "");
  Operand input(shape, input_type, gap, at_end);
  fill_normal(random, input, random.pick({1.0, 5.0, 100.0}));
  for (int64_t row = 0; row < shape.rows(); row += 3)
    if (shape.classes > 1) input.set(row, random.below(shape.classes - 1), -INFINITY);  // never all of a row
  if (any_double({input_type, output_type}))
    try_softmax_as<double>(random, input, output_type, gap, at_end);
  else
    try_softmax_as<float>(random, input, output_type, gap, at_end);
}

void try_softmax_backward(Random& random) {
  const Shape shape = random.shape();
  const DType type = random.dtype(), grad_input_type = random.one_in(2) ? type : random.dtype();
  const int64_t gap = random.pick<int64_t>({0, 0, 3});
  const bool at_end = random.one_in(2), log = random.one_in(2);
  trial += text("softmax_backward of ", text_of(shape), " ", name_of(type), " to ", name_of(grad_input_type), " gap ",
                gap, at_end ? " at the end" : "");
  Operand grad(shape, type, gap, at_end), output(shape, type, gap, at_end);
  fill_normal(random, grad, 1);
  for (int64_t row = 0; row < shape.rows(); row++) {
    const double share = std::log(static_cast<double>(shape.classes));
    for (int64_t c = 0; c < shape.classes; c++) {
      const double z = -share - std::abs(random.normal());  // sums to less than 1
      output.set(row, c, log ? z : std::exp(z));
    }
  }
  if (any_double({type, grad_input_type}))
    try_softmax_backward_as<double>(random, grad, output, grad_input_type, gap, at_end, log);
  else
    try_softmax_backward_as<float>(random, grad, output, grad_input_type, gap, at_end, log);
}

void try_scale_rows(Random& random) {
  const Shape shape = random.shape();
  const DType type = random.dtype();
  const int64_t gap = random.pick<int64_t>({0, 0, 3});
  const bool at_end = random.one_in(2), one_for_all = random.one_in(3);
  trial += text("scale_rows of ", text_of(shape), " ", name_of(type), " gap ", gap, at_end ? " at the end" : "");
  Operand before(shape, type, gap, at_end);
  fill_normal(random, before, 1);
  const Array<float> factor(one_for_all ? 1 : shape.rows());
  for (int64_t i = 0; i < factor.count(); i++) factor[i] = static_cast<float>(random.normal());
  factor[0] = NAN;
  before.set(0, 0, 0);  // stays 0
  const double divisor = 2;
  const RowValues factors{factor.values(), DType::kFloat32, one_for_all ? 0 : 1, &divisor, true};
  const auto after = run_callers(shape, type, gap, at_end, [&](Operand& data) {
    data.copy(before);
    const JoinedLayout layout({&data});
    run_split(ScaleRows{{data.data(), type, factors}, {layout}});
  });
  for (int64_t row = 0; row < shape.rows(); row++)
    for (int64_t c = 0; c < shape.classes; c++) {
      const double value = before.get(row, c), scale = 0.5 * factor[one_for_all ? 0 : row];
      const double product = value == 0 ? 0 : value * scale;
      expect<double>(after->get(row, c), product, type, std::abs(product), "product", row, c);
    }
}

void try_scan_and_exp(Random& random) {
  const int64_t n = random.below(200), classes = 1 + random.below(100);
  trial += text("scan of ", n, " targets of ", classes, " classes");
  const Array<int64_t> wide(n);
  const Array<uint8_t> narrow(n);
  const Array<float> x(n), y(n);
  int64_t live = 0;
  const int64_t ignored = random.pick<int64_t>({-100, 0, 200}), bad = n == 0 || random.one_in(2) ? -1 : random.below(n);
  for (int64_t i = 0; i < n; i++) {
    narrow[i] = static_cast<uint8_t>(i == bad ? 201 : random.below(classes));
    wide[i] = narrow[i];
    x[i] = static_cast<float>(-30 * random.uniform());
    live += wide[i] != ignored;
  }
  const ClassScan a = kernels().scan_classes(wide.values(), n, classes, ignored);
  const ClassScan b = kernels().scan_classes_u8(narrow.values(), n, classes, ignored);
  for (const ClassScan& found : {a, b})
    if (found.live != live || found.out_of_range != (bad >= 0)) fail("the scan is wrong");
  kernels().exp_float(x.values(), y.values(), n);
  for (int64_t i = 0; i < n; i++) {
    const double exact = std::exp(static_cast<double>(x[i]));
    expect<float>(y[i], exact, DType::kFloat32, exact, "exponential", i);
  }
}

}  // namespace softmax_ext::native
