// Operands of the shape [outer, classes, inner] in guarded memory, and the layout that joins those of one call.
#pragma once

#include <initializer_list>
#include <vector>

#include "guarded.h"
#include "layout.h"
#include "ops/cpu/values.h"

namespace softmax_ext::native {

enum class Order {
  kRows,     // the rows layout; inner is 1
  kInner,    // columns: inner has stride 1
  kClasses,  // columns: the classes have stride 1
  kStrided,  // columns: nothing has
};

struct Shape {
  Order order;
  int64_t outer, classes, inner;
  bool permuted;  // outer is two dimensions that lie in memory the other way round; outer is even

  int64_t rows() const { return outer * inner; }
};

class Operand {
 public:
  // `gap` elements between runs, which no kernel may write.
  Operand(const Shape& shape, DType type, int64_t gap, bool at_end)
      : shape_(shape), type_(type), strides_(shape, gap), memory_(extent() * bytes_of(type), at_end) {}

  DType type() const { return type_; }
  const Shape& shape() const { return shape_; }
  char* data() const { return memory_.data(); }
  const Guarded& memory() const { return memory_; }
  double get(int64_t row, int64_t c) const { return value_at(data(), type_, at(row, c)); }
  void set(int64_t row, int64_t c, double value) { set_value(data() + at(row, c) * bytes_of(type_), type_, value); }
  void copy(const Operand& other) { std::memcpy(data(), other.data(), memory_.bytes()); }

  int64_t class_stride() const { return strides_.classes; }
  int64_t inner_stride() const { return strides_.inner; }
  int64_t outer_stride() const { return strides_.outer; }

  bool gaps_untouched() const {
    std::vector<bool> used(extent());
    for (int64_t row = 0; row < shape_.rows(); row++)
      for (int64_t c = 0; c < shape_.classes; c++) used[at(row, c)] = true;
    const int64_t bytes = bytes_of(type_);
    for (int64_t i = 0; i < extent() * bytes; i++)
      if (!used[i / bytes] && static_cast<unsigned char>(data()[i]) != Guarded::kUntouched) return false;
    return true;
  }

  static int64_t bytes_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

 private:
  struct Strides {
    int64_t classes = 1, inner = 0, outer = 0;
    Strides(const Shape& s, int64_t gap) {
      switch (s.order) {
        case Order::kRows: classes = 1, inner = 0, outer = s.classes + gap; break;
        case Order::kInner: inner = 1, classes = s.inner + gap, outer = s.classes * classes; break;
        case Order::kClasses: classes = 1, inner = s.classes + gap, outer = s.inner * inner; break;
        case Order::kStrided: inner = 2, classes = 2 * s.inner + gap, outer = s.classes * classes; break;
      }
    }
  };

  int64_t extent() const {
    return (shape_.outer - 1) * strides_.outer + (shape_.classes - 1) * strides_.classes +
           (shape_.inner - 1) * strides_.inner + 1;
  }
  int64_t at(int64_t row, int64_t c) const {
    const int64_t outer = row / shape_.inner, half = shape_.outer / 2;
    const int64_t place = shape_.permuted ? outer % half * 2 + outer / half : outer;
    return place * strides_.outer + row % shape_.inner * strides_.inner + c * strides_.classes;
  }

  Shape shape_;
  DType type_;
  Strides strides_;
  Guarded memory_;
};

class JoinedLayout {
 public:
  // Null: an operand that is not there.
  explicit JoinedLayout(std::initializer_list<const Operand*> operands) {
    const Shape& shape = (*operands.begin())->shape();
    layout_ = {shape.order == Order::kRows ? LayoutKind::kRows : LayoutKind::kColumns,
               shape.classes,
               shape.inner,
               shape.outer,
               shape.permuted ? 2 : 1,
               dims_,
               {},
               {}};
    const int64_t half = shape.outer / 2;
    dims_[0].size = shape.permuted ? half : shape.outer;
    dims_[0].stride[kRow] = shape.inner;
    dims_[1].size = 2;
    dims_[1].stride[kRow] = half * shape.inner;
    layout_.inner_stride[kRow] = 1;
    int slot = 0;
    for (const Operand* operand : operands) {
      if (operand) {
        dims_[0].stride[slot] = operand->outer_stride() * (shape.permuted ? 2 : 1);
        dims_[1].stride[slot] = operand->outer_stride();
        layout_.class_stride[slot] = operand->class_stride();
        layout_.inner_stride[slot] = operand->inner_stride();
      }
      slot++;
    }
  }
  JoinedLayout(const JoinedLayout&) = delete;  // the layout points into dims_
  JoinedLayout& operator=(const JoinedLayout&) = delete;

  operator const Layout&() const { return layout_; }

 private:
  OuterDim dims_[2]{};
  Layout layout_{};
};

}  // namespace softmax_ext::native
