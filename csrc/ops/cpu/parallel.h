// How the CPU kernels' units of work are split among threads, and the memory that each thread works in.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "../../cpu/scratch.h"
#include "../tensors.h"

namespace softmax_ext {

// Rows of at most this many classes share vectors (columns layout) although their classes are contiguous. That depends
// on nothing else, so that a row has the same bits alone and among others.
constexpr int64_t kSmallClasses = 128;

constexpr LayoutRule kLayoutRule{kSmallClasses, std::numeric_limits<int>::max()};

// Rows, or tiles of kTile rows.
inline int64_t units(const Layout& layout) {
  return layout.kind == LayoutKind::kRows ? layout.outer : layout.outer * ((layout.inner + kTile - 1) / kTile);
}

// Splits units of work into groups, by a rule that knows nothing of threads, and runs them in parallel:
// run(group, begin unit, end unit, scratch). Sums over groups taken in order are the same for any number of threads.
//
// Each thread takes a run of groups, then ever smaller ones from what is left, so that none waits where the groups'
// work differs (ignored rows cost nothing) or a core is busy elsewhere, and threads seldom write to one page.
class Groups {
 public:
  Groups(int64_t units, int64_t elements_per_unit) : units_(units) {
    size_ = std::max<int64_t>(1, (units + kMaxGroups - 1) / kMaxGroups);
    count_ = (units + size_ - 1) / size_;
    grain_ = std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, elements_per_unit * size_));
  }
  explicit Groups(const Layout& layout)
      : Groups(units(layout), layout.classes * (layout.kind == LayoutKind::kRows ? 1 : kTile)) {}

  int64_t count() const { return count_; }

  // At most so many run at once.
  int64_t threads() const {
    return std::clamp<int64_t>((count_ + grain_ - 1) / grain_, 1, torch::stable::get_num_threads());
  }

  // The memory of all threads, `scratch_bytes` (a multiple of Scratch::kAlignment) for each, is there before any
  // begins.
  template <typename F>
  void run(size_t scratch_bytes, const F& f) const {
    struct alignas(Scratch::kAlignment) Line {
      char bytes[Scratch::kAlignment];
    };
    const int64_t lines = scratch_bytes / sizeof(Line), places = lines ? threads() : 0;
    const std::unique_ptr<Line[]> memory(places ? new Line[places * lines] : nullptr);
    std::atomic<int64_t> next{0}, next_place{0};
    torch::stable::parallel_for(0, count_, grain_, [&](int64_t share_begin, int64_t share_end) {
      const int64_t place = lines ? next_place++ : 0;
      if (lines && place >= places) return;  // the others do its share
      Line* const scratch = memory.get() + place * lines;
      const int64_t threads = (count_ + share_end - share_begin - 1) / (share_end - share_begin);
      for (int64_t begin = next, size; begin < count_; begin = next) {
        size = std::max<int64_t>(1, (count_ - begin) / (2 * threads));
        if (threads == 1) size = count_;
        if (!next.compare_exchange_strong(begin, begin + size)) continue;
        const int64_t end = std::min(count_, begin + size);
        for (int64_t g = begin; g < end; g++) f(g, g * size_, std::min(units_, (g + 1) * size_), scratch);
      }
    });
  }

 private:
  // Elements below which a second thread costs more than it saves.
  static constexpr int64_t kParallelElements = 32768;
  static constexpr int64_t kMaxGroups = 1024;

  int64_t units_, size_, count_, grain_;
};

}  // namespace softmax_ext
