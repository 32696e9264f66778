// From tensors to what the kernels take: dtypes, allocation, and the joint layout of a call's operands.
// Everything here speaks torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../cpu/layout.h"

namespace softmax_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64, float32, bfloat16 or float16; anything else is an error that names `op` and `argument`.
DType dtype_of(const Tensor& tensor, const char* op, const char* argument);
DType dtype_of(ScalarType type, const char* op, const char* argument);

// double if any of the operands is.
ScalarType arithmetic_type(std::initializer_list<DType> types);

// One element of a contiguous array.
double value_at(const void* data, DType type, int64_t i);
void set_value(void* data, DType type, double value);

// Uninitialised and contiguous, on the device of `like`.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like);

// Uninitialised, of the shape and, where that is dense, the strides of `tensor`.
Tensor empty_like(const Tensor& tensor, ScalarType type);

Tensor as_contiguous(const Tensor& tensor);

std::vector<int64_t> sizes_of(const Tensor& tensor);

// Sizes without dimension `dim`.
std::vector<int64_t> batch_sizes(const Tensor& tensor, int64_t dim);

int64_t product(const std::vector<int64_t>& sizes);

// A dimension counted from the front, checked against the rank.
int64_t wrap_dim(const Tensor& tensor, int64_t dim, const char* op);

void check_same_sizes(const Tensor& a, const Tensor& b, const char* op, const char* argument);
void check_cpu(const Tensor& tensor, const char* op, const char* argument);

// Rows of at most this many classes share vectors (columns layout) although their classes are contiguous. That depends
// on nothing else, so that a row has the same bits alone and among others.
constexpr int64_t kSmallClasses = 128;

// The layout shared by up to four tensors of one shape (null: slot unused), with its dimensions' storage.
class JointLayout {
 public:
  JointLayout(const Tensor& shape, int64_t dim, const std::vector<const Tensor*>& operands,
              int64_t small_classes = kSmallClasses);
  JointLayout(const JointLayout&) = delete;  // layout() points into dims_
  JointLayout& operator=(const JointLayout&) = delete;

  const Layout& layout() const { return layout_; }
  int64_t units() const;  // rows, or tiles of kTile rows

 private:
  Layout layout_{};
  std::vector<OuterDim> dims_;
};

// Splits units of work into groups, by a rule that knows nothing of threads, and runs them in parallel:
// run(group, begin unit, end unit). Sums over groups taken in order are the same for any number of threads.
//
// Each thread takes a run of groups, then ever smaller ones from what is left, so that none waits where the groups' work
// differs (ignored rows cost nothing) or a core is busy elsewhere, and threads seldom write to one page.
class Groups {
 public:
  Groups(int64_t units, int64_t elements_per_unit);
  int64_t count() const { return count_; }

  template <typename F>
  void run(const F& f) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, count_, grain_, [&](int64_t share_begin, int64_t share_end) {
      const int64_t threads = (count_ + share_end - share_begin - 1) / (share_end - share_begin);
      for (int64_t begin = next, size; begin < count_; begin = next) {
        size = std::max<int64_t>(1, (count_ - begin) / (2 * threads));
        if (threads == 1) size = count_;
        if (!next.compare_exchange_strong(begin, begin + size)) continue;
        const int64_t end = std::min(count_, begin + size);
        for (int64_t g = begin; g < end; g++) f(g, g * size_, std::min(units_, (g + 1) * size_));
      }
    });
  }

 private:
  int64_t units_, size_, count_, grain_;
};

}  // namespace softmax_ext
