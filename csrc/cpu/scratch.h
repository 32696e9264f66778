// The memory that a kernel works in, taken piece by piece from one block of its caller's. A kernel allocates nothing,
// so that nothing can fail between its first write and its last: in place, half a gradient would stand in the logits.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace softmax_ext {

// Without memory, all pieces are null and only counted, which is how a kernel's caller learns the size of the block.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;  // of the block and of every piece

  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  // `count` values, not initialised.
  template <typename T>
  T* take(int64_t count) {
    char* const piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    add_gap();
    return reinterpret_cast<T*>(piece);
  }

  size_t bytes() const { return bytes_; }  // taken

 private:
  // Behind each piece, for AddressSanitizer, which sees the block as one.
  void add_gap() {
#ifdef __SANITIZE_ADDRESS__
    if (memory_) ASAN_POISON_MEMORY_REGION(memory_ + bytes_, kAlignment);
    bytes_ += kAlignment;
#endif
  }

  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace softmax_ext
