// Softmax cross entropy of rows: forward, backward, or both in one visit (formulas: docs/math.md).
//
// Forward reads the logits once. Where the gradient is wanted in the same call, the exponentials are stored, in the
// gradient itself or in a buffer, and become the gradient once the row's sum is known. A row is read a second time
// instead if it is too long for the cache, or if its gradient needs the logits again. Backward reads the logits once
// and writes the gradient once.
//
// In the rows layout, float32 logits that need no transformation are read where they lie. Everything else, and every
// tile, passes through a buffer of the arithmetic's type. What depends on the target class alone is computed once per
// row, in double (cross_entropy/row_batch.h). Parts of rows are merged without any logits (cross_entropy/parts.h).
#include "cross_entropy/parts.h"
#include "cross_entropy/rows.h"
#include "cross_entropy/tiles.h"
#include "isa_kernels.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
double cross_entropy(const CrossEntropy<T>& p, int64_t begin, int64_t end, void* memory) {
  if (p.parts && !p.part) return visit_all_parts(p, begin, end);
  Scratch scratch(memory);
  return p.layout.kind == LayoutKind::kRows ? visit_all_rows(p, begin, end, scratch)
                                            : visit_all_tiles(p, begin, end, scratch);
}

template <typename T>
size_t scratch_of(const CrossEntropy<T>& p) {
  Scratch scratch;
  if (p.parts && !p.part) return 0;
  if (p.layout.kind == LayoutKind::kRows)
    exp_buffers_of(p, scratch);
  else
    TileScratch<T>(p, scratch);
  return scratch.bytes();
}

template <typename Index>
ClassScan scan(const Index* index, int64_t n, int64_t classes, int64_t ignore_index) {
  int64_t live = 0, wrong = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t y = static_cast<int64_t>(index[i]), is_live = y != ignore_index;
    live += is_live;
    wrong |= is_live & (static_cast<uint64_t>(y) >= static_cast<uint64_t>(classes));
  }
  return {live, wrong != 0};
}

}  // namespace

ClassScan scan_classes(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return scan(index, n, classes, ignore_index);
}
ClassScan scan_classes_u8(const uint8_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  return scan(index, n, classes, ignore_index);
}
size_t scratch_bytes(const CrossEntropy<float>& p) { return scratch_of(p); }
size_t scratch_bytes(const CrossEntropy<double>& p) { return scratch_of(p); }
double cross_entropy_float(const CrossEntropy<float>& p, int64_t begin, int64_t end, void* scratch) {
  return cross_entropy(p, begin, end, scratch);
}
double cross_entropy_double(const CrossEntropy<double>& p, int64_t begin, int64_t end, void* scratch) {
  return cross_entropy(p, begin, end, scratch);
}

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
