// Where a unit of work lies, and the movement of tiles: buffers [classes, kTile] of the arithmetic's type T with one
// row per column, so that a vector holds one class of several rows. Included only by units compiled per instruction
// set.
#pragma once

#include "scratch.h"
#include "vector.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// Classes of a tile that are held in a block at a time.
template <typename T>
constexpr int64_t kTileClasses = kBlock<T> / kTile;

// ---- where a unit of work lies ---------------------------------------------------------------------------------

// Offsets of each operand for one unit: a row, or a tile of up to kTile rows along `inner`.
struct Position {
  int64_t offset[kOperands];
  int64_t rows;
};

inline Position locate(const Layout& layout, int64_t unit) {
  Position at{};
  const int64_t tiles = layout.kind == LayoutKind::kRows ? 1 : (layout.inner + kTile - 1) / kTile;
  int64_t outer = unit / tiles;
  const int64_t first = (unit % tiles) * kTile;
  at.rows = layout.kind == LayoutKind::kRows ? 1 : (layout.inner - first < kTile ? layout.inner - first : kTile);
  for (int i = 0; i < kOperands; i++)
    at.offset[i] = layout.kind == LayoutKind::kRows ? 0 : first * layout.inner_stride[i];
  for (int d = layout.outer_dims - 1; d >= 0; d--) {
    const OuterDim& dim = layout.dims[d];
    const int64_t index = d == 0 ? outer : outer % dim.size;  // a division saved, which counts for short rows
    if (d > 0) outer /= dim.size;
    for (int i = 0; i < kOperands; i++) at.offset[i] += index * dim.stride[i];
  }
  return at;
}

// ---- transposition ---------------------------------------------------------------------------------------------

// dst[c * dst_stride + r] = src[r * src_stride + c] for `rows` rows of `columns`.
template <typename T>
inline void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t columns, T* dst, int64_t dst_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) dst[c * dst_stride + r] = src[r * src_stride + c];
}

#ifdef CPU_CAPABILITY_AVX512
// Interleaves the first with the third quarter of 16 registers and so on: four times that transposes 16 x 16, each time
// doubling the length of the runs that stay together.
inline void transpose_registers(__m512 (&v)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 4) {
    v[i] = low(t[i], t[i + 2]);
    v[i + 1] = high(t[i], t[i + 2]);
    v[i + 2] = low(t[i + 1], t[i + 3]);
    v[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int k = 0; k < 4; k++) {
      t[i + k] = _mm512_shuffle_f32x4(v[i + k], v[i + k + 4], 0x88);
      t[i + k + 4] = _mm512_shuffle_f32x4(v[i + k], v[i + k + 4], 0xdd);
    }
  for (int k = 0; k < 8; k++) {
    v[k] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
    v[k + 8] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
  }
}

inline void transpose(const float* src, int64_t src_stride, int64_t rows, int64_t columns, float* dst,
                      int64_t dst_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t height = std::min<int64_t>(16, rows - r);
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t width = std::min<int64_t>(16, columns - c);
      const __mmask16 in = (1u << width) - 1, out = (1u << height) - 1;
      __m512 v[16];
      for (int i = 0; i < 16; i++)
        v[i] = i < height ? _mm512_maskz_loadu_ps(in, src + (r + i) * src_stride + c) : _mm512_setzero_ps();
      transpose_registers(v);
      for (int i = 0; i < 16; i++)
        if (i < width) _mm512_mask_storeu_ps(dst + (c + i) * dst_stride + r, out, v[i]);
    }
  }
}
#endif

// ---- loads and stores --------------------------------------------------------------------------------------------

// Rows whose classes are adjacent pass through this many columns of 16 converted rows.
constexpr int64_t kTransposedRows = 16, kTransposedClasses = 64;

template <typename T, typename S>
inline void load_transposed(const S* src, int64_t inner_stride, int64_t classes, int64_t rows, T* dst) {
  if constexpr (std::is_same_v<S, T>) {
    transpose(src, inner_stride, rows, classes, dst, kTile);
  } else {
    alignas(64) T buffer[kTransposedRows * kTransposedClasses];
    for (int64_t r = 0; r < rows; r += kTransposedRows) {
      const int64_t height = std::min(kTransposedRows, rows - r);
      for (int64_t c = 0; c < classes; c += kTransposedClasses) {
        const int64_t width = std::min(kTransposedClasses, classes - c);
        const S* first = src + r * inner_stride + c;
        if (width == inner_stride)
          load_run_as(first, height * width, buffer);
        else
          for (int64_t i = 0; i < height; i++) load_run_as(first + i * inner_stride, width, buffer + i * width);
        transpose(buffer, width, height, width, dst + c * kTile + r, kTile);
      }
    }
  }
}

template <typename T, typename S>
inline void store_transposed(const T* src, int64_t inner_stride, int64_t classes, int64_t rows, S* dst) {
  if constexpr (std::is_same_v<S, T>) {
    transpose(src, kTile, classes, rows, dst, inner_stride);
  } else {
    alignas(64) T buffer[kTransposedRows * kTransposedClasses];
    for (int64_t r = 0; r < rows; r += kTransposedRows) {
      const int64_t height = std::min(kTransposedRows, rows - r);
      for (int64_t c = 0; c < classes; c += kTransposedClasses) {
        const int64_t width = std::min(kTransposedClasses, classes - c);
        transpose(src + c * kTile + r, kTile, width, height, buffer, width);
        S* first = dst + r * inner_stride + c;
        if (width == inner_stride)
          store_run_as(buffer, height * width, first, Store::kCached);
        else
          for (int64_t i = 0; i < height; i++)
            store_run_as(buffer + i * width, width, first + i * inner_stride, Store::kCached);
      }
    }
  }
}

template <typename T, typename S>
inline void load_tile_as(const S* src, int64_t class_stride, int64_t inner_stride, int64_t classes, int64_t rows,
                         T* dst) {
  if (inner_stride == 1) {
    for (int64_t c = 0; c < classes; c++) load_run_as(src + c * class_stride, rows, dst + c * kTile);
  } else if (class_stride == 1) {
    load_transposed(src, inner_stride, classes, rows, dst);
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < classes; c++)
        dst[c * kTile + r] = static_cast<T>(src[c * class_stride + r * inner_stride]);
  }
}

// dst[c, r] = src[at + c * class_stride + r * inner_stride] for r < rows; the columns beyond are left as they are.
template <typename T>
inline void load_tile(const void* src, DType type, int64_t at, int64_t class_stride, int64_t inner_stride,
                      int64_t classes, int64_t rows, T* dst) {
  with_type(type, [&](auto element) {
    using S = typename decltype(element)::Type;
    load_tile_as(static_cast<const S*>(src) + at, class_stride, inner_stride, classes, rows, dst);
  });
}

template <typename T, typename S>
inline void store_tile_as(const T* src, int64_t class_stride, int64_t inner_stride, int64_t classes, int64_t rows,
                          S* dst, Store how) {
  if (inner_stride == 1) {
    for (int64_t c = 0; c < classes; c++) store_run_as(src + c * kTile, rows, dst + c * class_stride, how);
  } else if (class_stride == 1) {
    store_transposed(src, inner_stride, classes, rows, dst);
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < classes; c++)
        dst[c * class_stride + r * inner_stride] = static_cast<S>(src[c * kTile + r]);
  }
}

template <typename T>
inline void store_tile(const T* src, void* dst, DType type, int64_t at, int64_t class_stride, int64_t inner_stride,
                       int64_t classes, int64_t rows, Store how) {
  with_type(type, [&](auto element) {
    using S = typename decltype(element)::Type;
    store_tile_as(src, class_stride, inner_stride, classes, rows, static_cast<S*>(dst) + at, how);
  });
}

// Classes [first, first + classes) of one operand's tile; columns beyond the tile's rows, up to a whole vector, hold 0.
template <typename T>
inline void load_operand_tile(const Layout& layout, int operand, const void* src, DType type, const Position& at,
                              int64_t first, int64_t classes, T* dst) {
  load_tile(src, type, at.offset[operand] + first * layout.class_stride[operand], layout.class_stride[operand],
            layout.inner_stride[operand], classes, at.rows, dst);
  const int64_t padded = round_up(at.rows, kLanes<T>);
  if (padded == at.rows) return;
  for (int64_t c = 0; c < classes; c++) std::fill(dst + c * kTile + at.rows, dst + c * kTile + padded, T(0));
}

template <typename T>
inline void store_operand_tile(const Layout& layout, int operand, const T* src, void* dst, DType type,
                               const Position& at, int64_t first, int64_t classes, Store how) {
  store_tile(src, dst, type, at.offset[operand] + first * layout.class_stride[operand], layout.class_stride[operand],
             layout.inner_stride[operand], classes, at.rows, how);
}

// ---- buffers -------------------------------------------------------------------------------------------------------

// `count` buffers [classes, kTile]: of all classes as long as these are few enough to stay in cache, and then each
// operand is loaded once; else of a block of them at a time. Logits that lie in this order already are copied all the
// same: their strides are often such that the classes of a tile would drive each other out of the cache before they are
// read again.
template <typename T>
class TileBuffers {
 public:
  TileBuffers(const Layout& layout, int count, Scratch& scratch)
      : whole_(layout.classes * kTile <= kCachedElements),
        classes_(whole_ ? layout.classes : kTileClasses<T>),
        data_(scratch.take<T>(layout.kind == LayoutKind::kRows ? 0 : count * classes_ * kTile)) {}

  bool whole() const { return whole_; }
  int64_t classes() const { return classes_; }  // at a time
  T* get(int i) const { return data_ + i * classes_ * kTile; }

  // Calls visit(first class, classes) for each block of a tile.
  template <typename Visit>
  void each_block(const Layout& layout, const Visit& visit) const {
    for (int64_t c = 0; c < layout.classes; c += classes_) visit(c, std::min(classes_, layout.classes - c));
  }

 private:
  bool whole_;
  int64_t classes_;
  T* data_;
};

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
