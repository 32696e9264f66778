// Checks, allocation and layouts; see tensors.h.
#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace softmax_ext {

namespace {

OuterDim merge(const OuterDim& outer, const OuterDim& inner) {
  OuterDim merged = inner;
  merged.size = outer.size * inner.size;
  return merged;
}

bool mergeable(const OuterDim& outer, const OuterDim& inner) {
  for (int i = 0; i < kOperands; i++)
    if (outer.stride[i] != inner.stride[i] * inner.size) return false;
  return true;
}

}  // namespace

DType dtype_of(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float64, float32, bfloat16 or float16; got ",
                      torch::headeronly::toString(type), ".");
  }
}

DType dtype_of(const Tensor& tensor, const char* op, const char* argument) {
  return dtype_of(tensor.scalar_type(), op, argument);
}

ScalarType arithmetic_type(std::initializer_list<DType> types) {
  for (DType type : types)
    if (type == DType::kFloat64) return ScalarType::Double;
  return ScalarType::Float;
}

int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}

namespace {

std::string join(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// Torch's own text on it does not pass the stable ABI. "out of memory." is what training loops look for that try again
// with less.
[[noreturn]] void out_of_memory(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  const std::string bytes = std::to_string(product(sizes) * size_of(type)), shape = join(sizes);
  throw std::runtime_error(
      "softmax_ext: can't allocate " + bytes + " bytes for a tensor of shape [" + shape + "]: " +
      (like.is_cuda() ? "CUDA out of memory. (Or the device has failed before.)" : "the CPU is out of memory."));
}

}  // namespace

Tensor torch_empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                           const Tensor& like) {
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type,
                               like.get_device_index(), &handle) != AOTI_TORCH_SUCCESS)
    out_of_memory(sizes, type, like);
  return Tensor(handle);
}

namespace {

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// Whether the elements fill a run of memory, each in its own place.
bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); d++)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return device::empty_strided(sizes, contiguous_strides(sizes), type, like);
}

Tensor empty_like(const Tensor& tensor, ScalarType type) {
  if (tensor.is_contiguous()) return empty(sizes_of(tensor), type, tensor);
  if (is_dense(tensor)) {
    const auto strides = tensor.strides();
    return device::empty_strided(sizes_of(tensor), {strides.begin(), strides.end()}, type, tensor);
  }
  // Through the dispatcher, which knows in which order the dimensions are to lie.
  const auto none = torch::stable::detail::from(std::nullopt);
  std::array<StableIValue, 6> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(std::optional<ScalarType>(type)),
                                    none,
                                    none,
                                    none,
                                    none};
  if (torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
    out_of_memory(sizes_of(tensor), type, tensor);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::runtime_error&) {
    out_of_memory(sizes_of(tensor), tensor.scalar_type(), tensor);
  }
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

std::vector<int64_t> batch_sizes(const Tensor& tensor, int64_t dim) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.erase(sizes.begin() + dim);
  return sizes;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

int64_t wrap_dim(const Tensor& tensor, int64_t dim, const char* op) {
  const int64_t rank = tensor.dim();
  STD_TORCH_CHECK(dim >= -rank && dim < rank, op, ": dim must lie in [", -rank, ", ", rank - 1, "]; got ", dim, ".");
  return dim < 0 ? dim + rank : dim;
}

void check_same_sizes(const Tensor& a, const Tensor& b, const char* op, const char* argument) {
  STD_TORCH_CHECK(sizes_of(a) == sizes_of(b), op, ": ", argument, " must have the input's shape.");
}

void check_device(const Tensor& tensor, const Tensor& input, const char* op, const char* argument) {
  STD_TORCH_CHECK(tensor.device() == input.device(), op, ": ", argument, " must be on the input's device.");
}

JointLayout::JointLayout(const Tensor& shape, int64_t dim, const std::vector<const Tensor*>& operands,
                         const LayoutRule& rule) {
  const auto sizes = shape.sizes();
  const int64_t rank = shape.dim();
  const auto stride_of = [&](size_t slot, int64_t d) {
    return slot < operands.size() && operands[slot] ? operands[slot]->stride(d) : 0;
  };

  std::vector<OuterDim> dims;
  int64_t row_stride = 1;
  for (int64_t d = rank - 1; d >= 0; d--) {
    if (d == dim) continue;
    OuterDim entry{};
    entry.size = sizes[d];
    for (size_t slot = 0; slot < kRow; slot++) entry.stride[slot] = stride_of(slot, d);
    entry.stride[kRow] = row_stride;
    row_stride *= entry.size;
    if (entry.size != 1) dims.push_back(entry);
  }
  const int64_t rows = row_stride;
  std::reverse(dims.begin(), dims.end());
  // Memory order of the first operand, so that a permuted view is walked as it lies.
  std::stable_sort(dims.begin(), dims.end(),
                   [](const OuterDim& a, const OuterDim& b) { return a.stride[0] > b.stride[0]; });
  for (const OuterDim& entry : dims) {
    if (!dims_.empty() && mergeable(dims_.back(), entry))
      dims_.back() = merge(dims_.back(), entry);
    else
      dims_.push_back(entry);
  }

  layout_.classes = sizes[dim];
  bool unit_stride = true;
  for (size_t slot = 0; slot < kRow; slot++) {
    const bool used = slot < operands.size() && operands[slot];
    layout_.class_stride[slot] = layout_.classes == 1 ? 1 : stride_of(slot, dim);
    if (used) unit_stride = unit_stride && layout_.class_stride[slot] == 1;
  }
  const bool by_rows = unit_stride && layout_.classes > rule.small_classes;
  layout_.kind = by_rows ? LayoutKind::kRows : LayoutKind::kColumns;
  layout_.inner = 1;
  if (!by_rows && !dims_.empty()) {
    const OuterDim& inner = dims_.back();
    layout_.inner = inner.size;
    std::copy(inner.stride, inner.stride + kOperands, layout_.inner_stride);
    dims_.pop_back();
  }
  layout_.outer = rows == 0 ? 0 : rows / layout_.inner;
  layout_.outer_dims = static_cast<int>(dims_.size());
  STD_TORCH_CHECK(layout_.outer == 0 || layout_.outer_dims <= rule.max_outer_dims,
                  "softmax_ext: the strides of the operands need ", layout_.outer_dims,
                  " dimensions beside the classes, and the kernels take ", rule.max_outer_dims,
                  ". Use input.contiguous().");
  layout_.dims = dims_.data();
}

}  // namespace softmax_ext
