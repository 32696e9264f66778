// The results of one row in float64, and how far others are from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cases.h"

namespace gpu_times {

// Values, and for each the magnitude of the terms that it is a sum of: what an error is relative to.
struct Exact {
  std::vector<double> value, scale;

  explicit Exact(size_t n) : value(n), scale(n) {}
  void set(size_t i, double exact, double magnitude) {
    value[i] = exact;
    scale[i] = magnitude;
  }
};

// The larger error; a NaN is the largest.
inline double worse(double a, double b) { return std::isnan(a) || b <= a ? a : b; }

inline double largest_error(const std::vector<double>& found, const Exact& exact) {
  double worst = 0;
  for (size_t i = 0; i < found.size(); i++)
    worst = worse(worst, std::fabs(found[i] - exact.value[i]) / (exact.scale[i] + 1e-30));
  return worst;
}

inline double log_sum_exp(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double one : x) sum += std::exp(one - max);
  return max + std::log(sum);
}

struct ExactRow {
  Exact gradient;
  Exact numbers{4};  // loss, lse, nll, entropy
  int64_t prediction = 0;
};

// docs/math.md. `target`: the mass of each class; `weight`: empty for ones; `total`: what the gradient is divided by.
inline ExactRow cross_entropy_row(const std::vector<double>& x, const std::vector<double>& target,
                                  const std::vector<double>& weight, const Option& option, double total) {
  const size_t n = x.size();
  std::vector<double> z = x;
  if (option.softcap > 0)
    for (double& one : z) one = option.softcap * std::tanh(one / option.softcap);
  const double lse = log_sum_exp(z);
  ExactRow row{Exact(n)};
  std::vector<double> mass(n);
  double all = 0, loss = option.z_loss * lse * lse, loss_scale = loss, nll = 0, nll_scale = 0, entropy = lse;
  for (size_t c = 0; c < n; c++) {
    mass[c] = (1 - option.smoothing) * target[c] + option.smoothing / static_cast<double>(n);
    if (!weight.empty()) mass[c] *= weight[c];
    all += mass[c];
    loss += mass[c] * (lse - z[c]);
    loss_scale += mass[c] * (std::fabs(lse) + std::fabs(z[c]));
    nll += target[c] * (lse - z[c]);
    nll_scale += target[c] * (std::fabs(lse) + std::fabs(z[c]));
  }
  for (size_t c = 0; c < n; c++) {
    const double p = std::exp(z[c] - lse), slope = option.softcap > 0 ? 1 - std::pow(z[c] / option.softcap, 2) : 1;
    const double pull = p * (all + 2 * option.z_loss * lse);
    entropy -= p * z[c];
    row.gradient.set(c, (pull - mass[c]) * slope / total, (std::fabs(pull) + mass[c]) * slope / total);
  }
  row.numbers.set(0, loss, loss_scale);
  row.numbers.set(1, lse, std::fabs(lse));
  row.numbers.set(2, nll, nll_scale);
  row.numbers.set(3, entropy, std::fabs(lse) + std::fabs(lse - entropy));
  row.prediction = std::max_element(z.begin(), z.end()) - z.begin();
  return row;
}

inline Exact softmax_row(const std::vector<double>& x, bool log) {
  const double lse = log_sum_exp(x);
  Exact exact(x.size());
  for (size_t c = 0; c < x.size(); c++) {
    const double p = std::exp(x[c] - lse);
    exact.set(c, log ? x[c] - lse : p, log ? std::fabs(x[c]) + std::fabs(lse) : p);
  }
  return exact;
}

// Of the saved output, as it was rounded.
inline Exact softmax_backward_row(const std::vector<double>& grad, const std::vector<double>& output, bool log) {
  double sum = 0, magnitude = 0;
  for (size_t c = 0; c < grad.size(); c++) {
    const double term = log ? grad[c] : grad[c] * output[c];
    sum += term;
    magnitude += std::fabs(term);
  }
  Exact exact(grad.size());
  for (size_t c = 0; c < grad.size(); c++) {
    const double p = log ? std::exp(output[c]) : output[c];
    if (log)
      exact.set(c, grad[c] - p * sum, std::fabs(grad[c]) + p * magnitude);
    else
      exact.set(c, p * (grad[c] - sum), p * (std::fabs(grad[c]) + magnitude));
  }
  return exact;
}

// The most that an error may be, relative to the terms: some roundings in float32, and one to bfloat16.
inline double tolerance(DType type) { return 1e-5 + (type == DType::kBFloat16 ? 1 / 256.0 : 0); }

}  // namespace gpu_times
