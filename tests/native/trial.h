// What the trials share: random draws, threads, and the judgement of a result.
#pragma once

#include <cmath>
#include <functional>
#include <initializer_list>
#include <random>
#include <sstream>
#include <string>

#include "operand.h"

namespace softmax_ext::native {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double normal() { return normal_(engine_); }
  double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine_); }
  template <typename V>
  V pick(std::initializer_list<V> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  DType dtype() { return pick({DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}); }
  Shape shape();

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Each trial is run by this many callers at once, on the same inputs: caller k with k + 1 threads.
constexpr int kCallers = 3;

void at_once(int callers, const std::function<void(int)>& call);

// ---- judgement ---------------------------------------------------------------------------------------------------

// Where the trial at hand is described, as the head of what fails in it.
extern std::string trial;
extern int failures;

void fail(const std::string& what);

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

const char* name_of(DType type);
std::string text_of(const Shape& shape);

// Errors allowed: half a unit in the last place of what is stored, and this of the arithmetic, relative to what the
// result was computed from. tests/unit/test_numerics.py measures the kernels' errors; here they are to be right everywhere.
template <typename T>
constexpr double kArithmeticError = sizeof(T) == 8 ? 4e-14 : 4e-6;

double roundoff(DType stored);
double smallest(DType stored);  // an error that is none

// Whether `got`, stored in `type`, is `exact`; `scale` is the size of what it was computed from.
template <typename T>
bool close(double got, double exact, DType type, double scale) {
  if (std::isnan(exact) || std::isinf(exact)) return std::isnan(exact) ? std::isnan(got) : got == exact;
  const double allowed = kArithmeticError<T> * scale + roundoff(type) * std::abs(exact) + smallest(type);
  return std::abs(got - exact) <= allowed;
}

template <typename T>
void expect(double got, double exact, DType type, double scale, const char* what, int64_t row, int64_t c = -1) {
  if (!close<T>(got, exact, type, scale))
    fail(text(what, " of row ", row, c < 0 ? "" : text(", class ", c), " is ", got, ", should be ", exact));
}

void expect_same(const Guarded& one, const Guarded& other, const char* what);

// double if any is float64.
inline bool any_double(std::initializer_list<DType> types) {
  for (DType type : types)
    if (type == DType::kFloat64) return true;
  return false;
}

template <typename T>
constexpr DType kOwnType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// ---- trials, and faults on purpose ---------------------------------------------------------------------------------

void try_cross_entropy(Random& random);
void try_softmax(Random& random);
void try_softmax_backward(Random& random);
void try_scale_rows(Random& random);
void try_scan_and_exp(Random& random);
void try_block_cache();

// Does what must not be done, to show that it does not pass; returns if nothing stopped it.
void commit_fault(const std::string& name);

}  // namespace softmax_ext::native
