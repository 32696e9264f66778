// Faults on purpose: what a sanitizer, a guarded page or the processor must stop.
#include "cpu/dispatch.h"
#include "trial.h"

namespace softmax_ext::native {
namespace {

Softmax<float> softmax_of(const Operand& input, const Operand& output, const Layout& layout) {
  return {{false, input.data(), input.type(), output.data(), output.type()}, {layout}};
}

void run(const Softmax<float>& k, int64_t rows) {
  const auto& kernel = kernels().of(k);
  const Guarded scratch(static_cast<int64_t>(kernel.scratch_bytes(k)));
  kernel.run(k, 0, rows, scratch.data());
}

// One class more than there are.
void overrun() {
  const Shape shape{Order::kRows, 1, 33, 1, false};
  Operand input(shape, DType::kFloat32, 0, true);
  const Operand output(shape, DType::kFloat32, 0, true);
  for (int64_t c = 0; c < 33; c++) input.set(0, c, 0);
  const JoinedLayout joined({&input, &output});
  Layout layout = joined;
  layout.classes++;
  run(softmax_of(input, output, layout), 1);
}

// Two threads that write the same rows.
void race() {
  const Shape shape{Order::kRows, 1000, 300, 1, false};
  Operand input(shape, DType::kFloat32, 0, true);
  const Operand output(shape, DType::kFloat32, 0, true);
  std::memset(input.data(), 0, input.memory().bytes());
  const JoinedLayout layout({&input, &output});
  at_once(2, [&](int) { run(softmax_of(input, output, layout), shape.rows()); });
}

// A shift by more bits than there are, in a value that the compiler cannot foresee.
void shift() {
  volatile int bits = 40;
  volatile int shifted = 1 << bits;
  (void)shifted;
}

#ifdef __x86_64__
void avx512_instruction() { asm volatile("vpxord %%zmm0, %%zmm0, %%zmm0" ::: "xmm0"); }
void avx2_instruction() { asm volatile("vpxor %%ymm0, %%ymm0, %%ymm0" ::: "xmm0"); }
#endif

}  // namespace

void commit_fault(const std::string& name) {
  if (name == "overrun") return overrun();
  if (name == "race") return race();
  if (name == "shift") return shift();
#ifdef __x86_64__
  if (name == "avx512") return avx512_instruction();
  if (name == "avx2") return avx2_instruction();
#endif
  std::fprintf(stderr, "no fault of the name %s\n", name.c_str());
  std::exit(0);
}

}  // namespace softmax_ext::native
