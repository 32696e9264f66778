// Memory between two pages that nobody may touch: it ends right before the one or begins right behind the other, so that
// an access beyond is a fault in any build, also by instructions that no sanitizer sees (masked and streamed ones).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace softmax_ext::native {

class Guarded {
 public:
  static constexpr unsigned char kUntouched = 0xa5;  // every byte, until it is written
  // The pages may be read, and hold NaNs: for an emulator whose masked loads read every lane. No store passes.
  static inline bool readable_pages = false;

  explicit Guarded(int64_t bytes, bool at_end = true) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    void* const mapping = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mapping_ = static_cast<char*>(mapping);
    // qemu 7.2 refuses an mprotect of no bytes.
    if (mapping == MAP_FAILED || (inside > 0 && mprotect(mapping_ + page, inside, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("native test: no memory");
      std::abort();
    }
    if (readable_pages) make_readable(mapping_, page), make_readable(mapping_ + page + inside, page);
    std::memset(mapping_ + page, kUntouched, inside);
    data_ = mapping_ + page + (at_end ? inside - bytes : 0);
    ASAN_POISON_MEMORY_REGION(mapping_ + page, inside);
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(mapping_, mapped_);
    munmap(mapping_, mapped_);
  }

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool operator==(const Guarded& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data_, other.data_, bytes_) == 0;
  }

 private:
  static void make_readable(char* address, int64_t bytes) {
    mprotect(address, bytes, PROT_READ | PROT_WRITE);
    std::memset(address, 0xff, bytes);
    mprotect(address, bytes, PROT_READ);
  }

  int64_t bytes_, mapped_;
  char* mapping_;
  char* data_;
};

// `count` values.
template <typename T>
class Array : public Guarded {
 public:
  explicit Array(int64_t count, bool at_end = true)
      : Guarded(count * static_cast<int64_t>(sizeof(T)), at_end), count_(count) {}
  T* values() const { return reinterpret_cast<T*>(data()); }
  T& operator[](int64_t i) const { return values()[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
};

}  // namespace softmax_ext::native
