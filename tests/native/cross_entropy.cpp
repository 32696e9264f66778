// Trials of cross entropy, forward, backward and both in one visit, against the formulas of docs/math.md in double.
#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "groups.h"
#include "trial.h"

namespace softmax_ext::native {
namespace {

enum class Target { kInt64, kUint8, kProbabilities };

struct Case {
  Shape shape;
  DType logits_type, loss_type, probabilities_type;
  int64_t gap;
  bool at_end, non_temporal;
  Target target;
  bool weighted, stats, sum_only;
  bool row_weighted, by_probability;
  int64_t ignore_index;
  double smoothing, z_loss, z_factor, softcap, logit_scale;
  // Where the gradient is written: in the visit of the forward pass, over a copy of the logits too, or in backward.
  bool precompute, in_place;
  bool grad_lse, grad_nll, grad_entropy;  // in backward
  bool grad_probabilities;

  bool probabilities() const { return target == Target::kProbabilities; }
};

std::string text_of(const Case& o) {
  std::string words =
      text(text_of(o.shape), " ", name_of(o.logits_type), " loss ", name_of(o.loss_type), " gap ", o.gap);
  const char* const targets[] = {" int64", " uint8", " probabilities "};
  words += targets[static_cast<int>(o.target)];
  if (o.probabilities()) words += name_of(o.probabilities_type);
  words += text(" ignore ", o.ignore_index, " smoothing ", o.smoothing, " z_loss ", o.z_loss, " times ", o.z_factor,
                " softcap ", o.softcap, " scale ", o.logit_scale);
  const std::pair<bool, const char*> flags[] = {{o.at_end, "at the end"},
                                                {o.non_temporal, "non-temporal"},
                                                {o.weighted, "weighted"},
                                                {o.row_weighted, "row weights"},
                                                {o.by_probability, "by probability"},
                                                {o.stats, "stats"},
                                                {o.sum_only, "sum only"},
                                                {o.in_place, "in place"},
                                                {o.precompute, "precompute"},
                                                {o.grad_lse, "grad_lse"},
                                                {o.grad_nll, "grad_nll"},
                                                {o.grad_entropy, "grad_entropy"},
                                                {o.grad_probabilities, "grad_probabilities"}};
  for (const auto& [set, word] : flags) words += set ? text(" ", word) : "";
  return words;
}

Case draw(Random& random) {
  Case o{};
  o.shape = random.shape();
  o.logits_type = random.dtype();
  o.loss_type = random.one_in(2) ? o.logits_type : random.dtype();
  o.probabilities_type = random.one_in(2) ? o.logits_type : random.dtype();
  o.gap = random.pick<int64_t>({0, 0, 3});
  o.at_end = random.one_in(2);
  o.non_temporal = random.one_in(2);
  o.target = random.pick({Target::kInt64, Target::kUint8, Target::kProbabilities});
  if (o.target == Target::kUint8 && o.shape.classes > 256) o.target = Target::kInt64;
  o.weighted = random.one_in(3);
  o.row_weighted = random.one_in(4);
  o.by_probability = !o.row_weighted && !o.probabilities() && random.one_in(4);
  o.stats = random.one_in(3);
  o.sum_only = random.one_in(4);
  o.ignore_index = random.pick<int64_t>({-100, 0});
  o.smoothing = random.pick({0.0, 0.0, 0.1, 1.0});
  o.z_loss = random.pick({0.0, 0.0, 0.01});
  o.z_factor = o.at_end ? 1.0 : 2.5;
  o.softcap = random.pick({0.0, 0.0, 0.0, 20.0});
  o.logit_scale = random.pick({1.0, 1.0, 0.5});
  o.precompute = random.one_in(2);
  o.in_place = random.one_in(3);
  if (o.precompute) return o;
  o.grad_lse = o.stats && random.one_in(2);
  o.grad_nll = o.stats && random.one_in(2);
  o.grad_entropy = o.stats && random.one_in(2);
  o.grad_probabilities = o.probabilities() && random.one_in(2);
  return o;
}

template <typename T>
double run_split(const CrossEntropy<T>& k) {
  const Groups groups(k.layout);
  std::vector<double> losses(groups.count());
  run_groups(k, groups, [&](const auto& kernel, int64_t group, int64_t begin, int64_t end, void* scratch) {
    losses[group] = kernel.run(k, begin, end, scratch);
  });
  double sum = 0;
  for (double loss : losses) sum += loss;
  return sum;
}

template <typename T>
struct Inputs {
  Operand logits, probabilities;
  Array<int64_t> index;
  Array<uint8_t> index_u8;
  Array<T> weight;
  double weight_sum = 0;
  Array<T> row_weight;
  Array<T> grad_loss, grad_lse, grad_nll, grad_entropy;

  Inputs(const Case& o, Random& random)
      : logits(o.shape, o.logits_type, o.gap, o.at_end),
        probabilities(o.shape, o.probabilities_type, o.gap, o.at_end),
        index(o.shape.rows()),
        index_u8(o.shape.rows()),
        weight(o.shape.classes + kWeightPadding),
        row_weight(o.shape.rows()),
        grad_loss(o.shape.rows()),
        grad_lse(o.shape.rows()),
        grad_nll(o.shape.rows()),
        grad_entropy(o.shape.rows()) {
    const int64_t classes = o.shape.classes;
    for (int64_t c = 0; c < weight.count(); c++)
      weight[c] = c < classes ? static_cast<T>(0.1 + random.uniform()) : T(0);
    for (int64_t c = 0; c < classes; c++) weight_sum += o.weighted ? weight[c] : T(1);
    // Minus infinity only where the loss stays finite.
    const bool may_mask = !o.probabilities() && o.smoothing == 0;
    for (int64_t row = 0; row < o.shape.rows(); row++) {
      const int64_t y = random.below(classes);
      index[row] = o.ignore_index < 0 && random.one_in(5) ? o.ignore_index : y;
      index_u8[row] = static_cast<uint8_t>(y);
      double sum = 0;
      for (int64_t c = 0; c < classes; c++) logits.set(row, c, 3 * random.normal());
      if (random.one_in(3)) logits.set(row, y, 25);  // nearly all the probability
      if (may_mask && classes > 1) logits.set(row, (y + 1 + random.below(classes - 1)) % classes, -INFINITY);
      for (int64_t c = 0; o.probabilities() && c < classes; c++) sum += std::exp(logits.get(row, c) / 3);
      for (int64_t c = 0; o.probabilities() && c < classes; c++)
        probabilities.set(row, c, std::exp(logits.get(row, classes - 1 - c) / 3) / sum);
      for (const Array<T>* upstream : {&grad_loss, &grad_lse, &grad_nll, &grad_entropy})
        (*upstream)[row] = static_cast<T>(random.normal());
      row_weight[row] = static_cast<T>(random.pick({0.0, 0.5, 1.0, -2.0}));
    }
  }

  int64_t target_of(const Case& o, int64_t row) const {
    return o.target == Target::kUint8 ? index_u8[row] : index[row];
  }
};

template <typename T>
struct Outputs {
  Operand grad_logits, grad_probabilities;
  Guarded loss;
  double sum = 0;
  Array<T> state, lse, nll, entropy;
  Array<int64_t> prediction;

  explicit Outputs(const Case& o)
      : grad_logits(o.shape, o.logits_type, o.gap, o.at_end),
        grad_probabilities(o.shape, o.probabilities_type, o.gap, o.at_end),
        loss(o.shape.rows() * Operand::bytes_of(o.loss_type)),
        state((o.probabilities() ? 4 : 3) * o.shape.rows()),
        lse(o.shape.rows()),
        nll(o.shape.rows()),
        entropy(o.shape.rows()),
        prediction(o.shape.rows()) {}
};

// Forward and backward, in one visit or in two.
template <typename T>
void run_both(const Case& o, const Inputs<T>& in, Outputs<T>& out) {
  if (o.in_place) out.grad_logits.copy(in.logits);
  const Operand& logits = o.in_place ? out.grad_logits : in.logits;
  const Operand* const q = o.probabilities() ? &in.probabilities : nullptr;
  const JoinedLayout layout({&logits, &out.grad_logits, q, o.grad_probabilities ? &out.grad_probabilities : nullptr});
  CrossEntropy<T> k{};
  k.layout = layout;
  k.rows = o.shape.rows();
  k.all_classes = o.shape.classes;
  k.logits = logits.data();
  k.logits_type = o.logits_type;
  k.has_probabilities = o.probabilities();
  if (q) k.probabilities = q->data();
  k.probabilities_type = o.probabilities_type;
  if (o.target == Target::kInt64) k.index = in.index.values();
  if (o.target == Target::kUint8) k.index_u8 = in.index_u8.values();
  k.non_temporal = o.non_temporal && !o.in_place;
  k.weight = o.weighted ? in.weight.values() : nullptr;
  k.weight_sum = o.weighted ? &in.weight_sum : nullptr;
  k.options = rounded_to<T>(
      Options{0, kNone, o.ignore_index, o.smoothing, o.z_loss, o.softcap, o.logit_scale, o.by_probability, false});
  if (o.row_weighted) k.row_weight = in.row_weight.values();
  if (o.z_factor != 1) k.z_factor = &o.z_factor;
  k.state = out.state.values();
  k.entropy = out.entropy.values();
  const double divisor = 2;
  const auto each = [&](const Array<T>& values, bool given) {
    return RowValues{values.values(), kOwnType<T>, 1, &divisor, given};
  };

  k.forward = true;
  k.loss = o.sum_only ? nullptr : out.loss.data();
  k.loss_type = o.loss_type;
  k.stats = o.stats;
  k.lse = out.lse.values();
  k.nll = out.nll.values();
  k.prediction = out.prediction.values();
  if (o.precompute) k.grad_logits = out.grad_logits.data();
  k.grad_loss = each(in.grad_loss, true);
  out.sum = run_split(k);
  if (o.precompute) return;

  k.forward = k.stats = false;
  if (o.by_probability) k.row_weight = out.state.values() + 2 * k.rows;
  k.grad_logits = out.grad_logits.data();
  k.grad_probabilities = o.grad_probabilities ? out.grad_probabilities.data() : nullptr;
  k.grad_lse = each(in.grad_lse, o.grad_lse);
  k.grad_nll = each(in.grad_nll, o.grad_nll);
  k.grad_entropy = each(in.grad_entropy, o.grad_entropy);
  run_split(k);
}

// a * b, 0 where a is: a class without probability has no part in a sum.
double times(double a, double b) { return a == 0 ? 0 : a * b; }

// One row by the formulas.
template <typename T>
struct ExactRow {
  const Case& o;
  const Inputs<T>& in;
  int64_t row, y, argmax = 0;
  bool ignored;
  std::vector<double> z, slope, p, q, b;
  double factor = 1;  // of the loss
  double lse, not_p_of_max, loss = 0, nll = 0, entropy = 0, b_sum = 0, q_sum = 0, size = 1;

  ExactRow(const Case& options, const Inputs<T>& inputs, int64_t number)
      : o(options),
        in(inputs),
        row(number),
        y(o.probabilities() ? -1 : in.target_of(o, row)),
        ignored(!o.probabilities() && y == o.ignore_index) {
    const int64_t classes = o.shape.classes;
    const auto weight = [&](int64_t c) { return o.weighted ? static_cast<double>(in.weight[c]) : 1.0; };
    const double eps = static_cast<T>(o.smoothing), share = eps / static_cast<double>(classes);
    for (int64_t c = 0; c < classes; c++) {
      const double x = static_cast<T>(o.logit_scale) * in.logits.get(row, c);
      z.push_back(o.softcap == 0 ? x : o.softcap * std::tanh(x / o.softcap));
      slope.push_back(o.softcap == 0 ? 1 : std::pow(std::cosh(x / o.softcap), -2));
      q.push_back(o.probabilities() ? in.probabilities.get(row, c) : c == y ? 1 : 0);
      b.push_back(weight(c) * ((1 - eps) * q[c] + share));
      if (z[c] > z[argmax]) argmax = c;
      b_sum += b[c];
      q_sum += q[c];
    }
    double rest = 0;  // the sum of the exponentials without the largest, which is 1
    for (int64_t c = 0; c < classes; c++) rest += c == argmax ? 0 : std::exp(z[c] - z[argmax]);
    lse = z[argmax] + std::log1p(rest);
    for (double zc : z) p.push_back(std::exp(zc - z[argmax]) / (1 + rest));
    not_p_of_max = rest / (1 + rest);
    for (int64_t c = 0; c < classes; c++) {
      entropy += times(p[c], lse - z[c]);
      nll += times(q[c], lse - z[c]);
      loss += times(b[c], lse - z[c]);
      if (std::isfinite(z[c])) size = std::max(size, std::abs(z[c]));
    }
    loss += o.z_loss * o.z_factor * lse * lse;
    if (o.row_weighted) factor = in.row_weight[row];
    if (o.by_probability && !ignored) factor = p[y];
    loss *= factor;
    if (ignored) loss = nll = 0;
  }

  double upstream(const Array<T>& values, bool wanted) const { return wanted ? 0.5 * values[row] : 0; }

  std::vector<double> gradient() const {
    const double g = ignored ? 0 : factor * upstream(in.grad_loss, true),
                 g_nll = ignored ? 0 : upstream(in.grad_nll, o.grad_nll);
    const double g_lse = upstream(in.grad_lse, o.grad_lse), g_entropy = upstream(in.grad_entropy, o.grad_entropy);
    const double all = g * (b_sum + 2 * o.z_loss * o.z_factor * lse) + g_lse + g_nll * q_sum;
    std::vector<double> result;
    for (size_t c = 0; c < z.size(); c++) {
      // all p - own, without the cancellation of a p close to 1.
      const double own = g * b[c] + g_nll * q[c], not_p = static_cast<int64_t>(c) == argmax ? not_p_of_max : 1 - p[c];
      const double of_z = (all - own) * p[c] - own * not_p - g_entropy * times(p[c], z[c] - lse + entropy);
      result.push_back(of_z * slope[c] * o.logit_scale);
    }
    return result;
  }

  double probability_gradient(int64_t c) const {
    const double weight = o.weighted ? static_cast<double>(in.weight[c]) : 1.0;
    const double of_loss = 0.5 * factor * in.grad_loss[row] * weight * (1 - static_cast<T>(o.smoothing));
    return times(of_loss + upstream(in.grad_nll, o.grad_nll), lse - z[c]);
  }
};

// The size of what the gradients of a row are rounded at: the largest of them, and more where they are differences of
// terms of the loss or of upstream gradients.
template <typename T>
double gradient_size(const ExactRow<T>& exact, const std::vector<double>& gradient) {
  double size = 0;
  for (double value : gradient) size = std::max(size, std::abs(value));
  const double of_terms = exact.o.smoothing * exact.b_sum + 2 * exact.o.z_loss * exact.o.z_factor * std::abs(exact.lse);
  size += of_terms * std::abs(exact.upstream(exact.in.grad_loss, true));
  if (exact.o.grad_lse) size += std::abs(exact.upstream(exact.in.grad_lse, true));
  if (exact.o.grad_nll) size += std::abs(exact.upstream(exact.in.grad_nll, true));
  if (exact.o.grad_entropy) size += exact.size * std::abs(exact.upstream(exact.in.grad_entropy, true));
  return size;
}

template <typename T>
void judge(const Case& o, const Inputs<T>& in, const Outputs<T>& out) {
  constexpr DType kOwn = kOwnType<T>;
  double sum = 0, sum_size = 1;
  for (int64_t row = 0; row < o.shape.rows(); row++) {
    const ExactRow<T> exact(o, in, row);
    const double size = exact.size * (1 + exact.b_sum) + std::abs(exact.loss);
    sum += exact.loss;
    sum_size += size;
    if (!o.sum_only) expect<T>(value_at(out.loss.data(), o.loss_type, row), exact.loss, o.loss_type, size, "loss", row);
    if (o.stats) {
      expect<T>(out.lse[row], exact.lse, kOwn, size, "lse", row);
      expect<T>(out.nll[row], exact.nll, kOwn, size, "nll", row);
      expect<T>(out.entropy[row], exact.entropy, kOwn, size, "entropy", row);
      const int64_t predicted = out.prediction[row];
      if (predicted < 0 || predicted >= o.shape.classes)
        fail(text("prediction of row ", row, " is ", predicted));
      else  // of transformed logits two may be equal where the exact ones differ
        expect<T>(exact.z[predicted], exact.z[exact.argmax], kOwn, exact.size, "predicted logit", row);
    }
    const std::vector<double> gradient = exact.gradient();
    const double gradient_scale = gradient_size(exact, gradient);
    for (int64_t c = 0; c < o.shape.classes; c++)
      expect<T>(out.grad_logits.get(row, c), gradient[c], o.logits_type, gradient_scale, "gradient", row, c);
    for (int64_t c = 0; o.grad_probabilities && c < o.shape.classes; c++)
      expect<T>(out.grad_probabilities.get(row, c), exact.probability_gradient(c), o.probabilities_type,
                2 * exact.size * (std::abs(in.grad_loss[row]) + std::abs(in.grad_nll[row])), "gradient of the target",
                row, c);
  }
  expect<T>(out.sum, sum, DType::kFloat64, sum_size, "sum of the losses", -1);
  if (!out.grad_logits.gaps_untouched()) fail("a gap between rows of the gradient is written");
  if (o.grad_probabilities && !out.grad_probabilities.gaps_untouched())
    fail("a gap of the target's gradient is written");
}

template <typename T>
void try_as(const Case& o, Random& random) {
  const Inputs<T> in(o, random);
  std::vector<std::unique_ptr<Outputs<T>>> out;
  for (int k = 0; k < kCallers; k++) out.push_back(std::make_unique<Outputs<T>>(o));
  at_once(kCallers, [&](int k) {
    threads_of_caller = k + 1;
    run_both(o, in, *out[k]);
  });
  for (int k = 1; k < kCallers; k++) {
    expect_same(out[0]->loss, out[k]->loss, "loss");
    expect_same(out[0]->lse, out[k]->lse, "lse");
    expect_same(out[0]->nll, out[k]->nll, "nll");
    expect_same(out[0]->entropy, out[k]->entropy, "entropy");
    expect_same(out[0]->prediction, out[k]->prediction, "prediction");
    expect_same(out[0]->grad_logits.memory(), out[k]->grad_logits.memory(), "gradient");
    expect_same(out[0]->grad_probabilities.memory(), out[k]->grad_probabilities.memory(), "gradient of the target");
    if (std::memcmp(&out[0]->sum, &out[k]->sum, sizeof(double)) != 0) fail("the sum differs between threads");
  }
  judge(o, in, *out[0]);
}

}  // namespace

void try_cross_entropy(Random& random) {
  const Case o = draw(random);
  trial += text("cross_entropy of ", text_of(o));
  const DType target_type = o.probabilities() ? o.probabilities_type : o.logits_type;
  if (any_double({o.logits_type, o.loss_type, target_type}))
    try_as<double>(o, random);
  else
    try_as<float>(o, random);
}

}  // namespace softmax_ext::native
