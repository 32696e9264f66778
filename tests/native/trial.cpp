#include "trial.h"

#include <cstdio>
#include <thread>
#include <vector>

namespace softmax_ext::native {

std::string trial;
int failures = 0;

void fail(const std::string& what) {
  // The first few say it all.
  if (failures++ < 20) std::fprintf(stderr, "FAILED %s\n       %s\n", trial.c_str(), what.c_str());
}

Shape Random::shape() {
  Shape shape{};
  shape.order = pick({Order::kRows, Order::kInner, Order::kClasses, Order::kStrided});
  // Around the lengths of vectors, of transposed blocks, of a block of each type, and of what stays in cache.
  shape.classes = pick<int64_t>(
      {1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 128, 129, 600, 1024, 1025, 2048, 2049, 2051, 4097, 5003});
  const int64_t most = std::max<int64_t>(1, 40000 / shape.classes);
  const auto up_to_most = [&](int64_t n) { return std::min(n, most); };
  shape.outer = up_to_most(pick<int64_t>({1, 2, 5, 16, 17, 40, 1200}));
  shape.inner = shape.order == Order::kRows
                    ? 1
                    : up_to_most(std::max<int64_t>(1, pick<int64_t>({1, 3, 16, 127, 128, 129, 300}) / shape.outer));
  if (shape.order == Order::kRows && one_in(20)) {
    shape.classes = 262145;
    shape.outer = 2;
  }
  shape.permuted = shape.outer % 2 == 0 && one_in(2);
  return shape;
}

void at_once(int callers, const std::function<void(int)>& call) {
  std::vector<std::thread> threads;
  threads.reserve(callers);
  for (int k = 0; k < callers; k++) threads.emplace_back(call, k);
  for (std::thread& thread : threads) thread.join();
}

const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

std::string text_of(const Shape& shape) {
  const char* const orders[] = {"rows", "inner", "classes", "strided"};
  return text(orders[static_cast<int>(shape.order)], " [", shape.outer, ", ", shape.classes, ", ", shape.inner, "]",
              shape.permuted ? " permuted" : "");
}

double roundoff(DType stored) {
  switch (stored) {
    case DType::kFloat64: return 0x1p-53;
    case DType::kFloat32: return 0x1p-24;
    case DType::kBFloat16: return 0x1p-8;
    default: return 0x1p-11;
  }
}

double smallest(DType stored) {
  switch (stored) {
    case DType::kFloat64: return 0x1p-1022;
    // Exponentials below the normal numbers, 2^-126, are 0: this is what those of 65536 classes may add up to.
    case DType::kFloat32:
    case DType::kBFloat16: return 0x1p-110;
    default: return 0x1p-24;
  }
}

void expect_same(const Guarded& one, const Guarded& other, const char* what) {
  if (!(one == other)) fail(text(what, " differs between callers or threads"));
}

}  // namespace softmax_ext::native
