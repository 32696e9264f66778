// The visit of a row whose classes are adjacent. A first pass reduces it, block by block, and can store the
// exponentials. A second writes a result of the same shape. Included only by units compiled per instruction set.
#pragma once

#include "logsumexp.h"
#include "scratch.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Where the exponentials of one row are stored, and the shift that those of each block were taken with.
template <typename T>
struct RowExps {
  T* data = nullptr;  // null: nowhere
  T* shifts = nullptr;
  bool in_result = false;  // which is then in cache when it is written
};

// The same for a batch of rows. The exponentials are stored in the result itself if it is of type T and the logits are
// used where they lie, otherwise in a buffer. A row that would not stay in cache is read again instead.
template <typename T>
class ExpBuffers {
 public:
  ExpBuffers(bool stores, bool in_result, int64_t classes, int64_t rows, Scratch& scratch)
      : active_(stores && classes <= kCachedElements),
        in_result_(in_result),
        stride_(round_up(classes, kLanes<T>)),
        blocks_(classes / kBlock<T> + 2) {
    if (!active_) return;
    shifts_ = scratch.take<T>(rows * blocks_);
    if (!in_result_) buffer_ = scratch.take<T>(rows * stride_);
  }

  bool active() const { return active_; }

  // Row r of the batch, whose result is of type T at `result` or of another type.
  RowExps<T> row(int64_t r, void* result, int64_t offset) const {
    if (!active_) return {};
    T* const data = in_result_ ? static_cast<T*>(result) + offset : buffer_ + r * stride_;
    return {data, shifts_ + r * blocks_, in_result_};
  }

 private:
  bool active_, in_result_;
  int64_t stride_, blocks_;
  T* shifts_ = nullptr;
  T* buffer_ = nullptr;
};

// Reduces a row of classes. load(c, n, buffer) returns z of the classes [c, c + n) padded with -inf to whole vectors,
// in `buffer` or, if `direct`, where they lie; visit(max so far, z, c, n) sees each block before its exponentials take
// its place; source and type are those of the logits, class 0 being element `at`.
template <bool Weighted, typename T, typename Load, typename Visit>
inline LogSumExp<T> reduce_row(int64_t classes, bool direct, const RowExps<T>& exps, const void* source, DType type,
                               int64_t at, const Load& load, const Visit& visit) {
  BlockBuffer<T> block;
  LogSumExp<T> sums;
  int64_t number = 0;
  for (int64_t c = 0, n; c < classes; c += n, number++) {
    n = next_block<T>(classes - c, classes, direct);
    const int64_t padded = round_up(n, kLanes<T>);
    T* const buffer = exps.data && !direct ? exps.data + c : block.data;
    const T* z = load(c, n, buffer);
    const int64_t excluded = follow_max<Weighted>(sums, z, padded, c);
    visit(sums.max, z, c, n);
    const Ahead ahead = ahead_of<T>(source, type, at + c + n);
    if (!exps.data) {
      if (z == buffer)
        add_buffered_block<Weighted, false>(sums, buffer, padded, excluded, buffer, ahead);
      else
        add_block<Weighted, false>(sums, z, padded, excluded, buffer, ahead);
      continue;
    }
    exps.shifts[number] = sums.max;
    if (z == buffer)
      add_buffered_block<Weighted, true>(sums, buffer, padded, excluded, buffer, ahead);
    else
      add_block<Weighted, true>(sums, z, padded, excluded, exps.data + c, ahead);
    if (buffer == block.data && z == buffer) std::copy(buffer, buffer + n, exps.data + c);
  }
  return sums;
}

// [at, at + n) of an operand = value(i, count), of type T, as store_vectors() takes it. `value` should hold by value
// what it needs: a reference would be read again after each store, since for all that the compiler knows a store
// changes anything.
template <typename T, typename Value>
inline void write_run(void* dst, DType type, int64_t at, int64_t n, Store how, Value value) {
  if (is_own<T>(type)) return store_vectors(static_cast<T*>(dst) + at, n, how, value);
  if constexpr (std::is_same_v<T, float>) {
    if (type == DType::kBFloat16) return store_as_halves(static_cast<c10::BFloat16*>(dst) + at, n, how, value);
    if (type == DType::kFloat16) return store_as_halves(static_cast<c10::Half*>(dst) + at, n, how, value);
  }
  BlockBuffer<T> block;
  store_vectors(block.data, n, Store::kCached, value);
  store_run(block.data, n, dst, type, at);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
