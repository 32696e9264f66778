// Softmax and log-softmax over the classes, their backward, and the scaling of rows by an upstream gradient.
//
// Forward reads a row once from memory. Until the sum of its exponentials is known these are stored, in the output
// where that is possible. Backward reads the upstream gradient and the saved output once from memory and once from
// cache.
#include "isa_kernels.h"
#include "row_visit.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// ---- what is computed for one vector --------------------------------------------------------------------------------

template <typename T>
struct Normaliser {
  Vec<T> max, log_sum, inverse_sum;
};

template <typename T>
inline Vec<T> normalise(bool log, const Normaliser<T>& by, const Vec<T>& z) {
  const Vec<T> d = z - by.max;
  return log ? d - by.log_sum : exp_nonpositive(d) * by.inverse_sum;
}

// What is summed over a row in backward, and what follows from the sum.
template <typename T>
inline Vec<T> backward_summand(bool log, const Vec<T>& grad, const Vec<T>& output) {
  return log ? grad : grad * output;
}

template <typename T>
inline Vec<T> backward_value(bool log, const Vec<T>& sum, const Vec<T>& grad, const Vec<T>& output) {
  return log ? grad - exp_nonpositive(at::vec::minimum(output, Vec<T>(0))) * sum : output * (grad - sum);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// [at, at + n) of an operand, padded to whole vectors; in `buffer` unless they can be used in place.
template <typename T>
const T* load_padded(const void* src, DType type, int64_t at, int64_t n, T padding, T* buffer) {
  const int64_t padded = round_up(n, kLanes<T>);
  if (is_own<T>(type) && n == padded) return static_cast<const T*>(src) + at;
  load_run(src, type, at, n, buffer);
  std::fill(buffer + n, buffer + padded, padding);
  return buffer;
}

template <typename T>
void write_softmax_from_exps(const Softmax<T>& p, const Position& at, const LogSumExp<T>& sums,
                             const RowExps<T>& exps) {
  const double inverse_sum = 1 / (1 + sums.rest_or_nan());
  const Store store = exps.in_result ? Store::kCached : store_of(p);
  for (int64_t c = 0, n, block = 0; c < p.layout.classes; c += n, block++) {
    n = next_block<T>(p.layout.classes - c, p.layout.classes, is_own<T>(p.input_type));
    const double shift = exps.shifts[block], max = sums.max;
    const Vec<T> factor(static_cast<T>(shift == max ? inverse_sum : inverse_sum * std::exp(shift - max)));
    write_run<T>(
        p.output, p.output_type, at.offset[kSoftmaxOutput] + c, n, store,
        [factor, e = exps.data + c](int64_t i, int64_t count) { return load_converted<T>(e + i, count) * factor; });
  }
}

template <typename T>
void write_log_softmax_or_long_row(const Softmax<T>& p, const Position& at, const LogSumExp<T>& sums) {
  const double rest = sums.rest_or_nan();
  const Normaliser<T> by{Vec<T>(sums.max), Vec<T>(static_cast<T>(std::log1p(rest))),
                         Vec<T>(static_cast<T>(1 / (1 + rest)))};
  BlockBuffer<T> block;
  for (int64_t c = 0, n; c < p.layout.classes; c += n) {
    n = next_block<T>(p.layout.classes - c, p.layout.classes, is_own<T>(p.input_type));
    const T* z = load_padded(p.input, p.input_type, at.offset[kSoftmaxInput] + c, n, T(0), block.data);
    write_run<T>(
        p.output, p.output_type, at.offset[kSoftmaxOutput] + c, n, store_of(p),
        [by, z, log = p.log](int64_t i, int64_t count) { return normalise(log, by, load_converted<T>(z + i, count)); });
  }
}

template <typename T>
void softmax_row(const Softmax<T>& p, const Position& at, const ExpBuffers<T>& exp_buffers) {
  const RowExps<T> exps = exp_buffers.row(0, p.output, at.offset[kSoftmaxOutput]);
  const int64_t first = at.offset[kSoftmaxInput];
  const LogSumExp<T> sums = reduce_row<false>(
      p.layout.classes, is_own<T>(p.input_type), exps, p.input, p.input_type, first,
      [&](int64_t c, int64_t n, T* buffer) {
        return load_padded(p.input, p.input_type, first + c, n, -kInfinity<T>, buffer);
      },
      [](T, const T*, int64_t, int64_t) {});
  if (exp_buffers.active())
    write_softmax_from_exps(p, at, sums, exps);
  else
    write_log_softmax_or_long_row(p, at, sums);
}

// The gradients and outputs of type S of one row.
template <typename T, typename S>
void softmax_backward_row_of(const SoftmaxBackward<T>& p, const Position& at) {
  constexpr int64_t L = kLanes<T>;
  const S* const g = static_cast<const S*>(p.grad_output) + at.offset[kSoftmaxGrad];
  const S* const y = static_cast<const S*>(p.output) + at.offset[kSoftmaxOutput];
  const int64_t classes = p.layout.classes;
  double sum = 0;
  for (int64_t c = 0, n; c < classes; c += n) {
    n = std::min(kBlock<T>, classes - c);
    Vec<T> s[4] = {Vec<T>(0), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
    const auto add = [&](int k, int64_t i, int64_t count) {
      s[k] = s[k] + backward_summand(p.log, load_converted<T>(g + c + i, count), load_converted<T>(y + c + i, count));
    };
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L)
      for (int k = 0; k < 4; k++) add(k, i + k * L, L);
    for (; i + L <= n; i += L) add(0, i, L);
    if (i < n) add(1, i, n - i);
    sum += sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  }
  const T total = static_cast<T>(sum);
  for (int64_t c = 0; c < classes; c += kBlock<T>)
    write_run<T>(p.grad_input, p.grad_input_type, at.offset[kSoftmaxInput] + c, std::min(kBlock<T>, classes - c),
                 store_of(p), [log = p.log, total, gc = g + c, yc = y + c](int64_t i, int64_t count) {
                   return backward_value(log, Vec<T>(total), load_converted<T>(gc + i, count),
                                         load_converted<T>(yc + i, count));
                 });
}

template <typename T>
void softmax_backward_row(const SoftmaxBackward<T>& p, const Position& at) {
  with_type(p.output_type, [&](auto element) {
    using S = typename decltype(element)::Type;
    if constexpr (sizeof(S) <= sizeof(T)) softmax_backward_row_of<T, S>(p, at);
  });
}

// ---- columns --------------------------------------------------------------------------------------------------------

// Replaces each element of the first `classes` classes of a tile by value(normaliser of its row, element).
template <typename T, typename Value>
void normalise_tile(const BatchSums<T>& sums, const T* log_sum, const T* inverse_sum, int64_t rows, int64_t classes,
                    T* buffer, const Value& value) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    const Normaliser<T> by{Vec<T>::loadu(sums.max + r), Vec<T>::loadu(log_sum + r), Vec<T>::loadu(inverse_sum + r)};
    for (int64_t i = 0; i < classes; i++) {
      T* z = buffer + i * kTile + r;
      value(by, Vec<T>::loadu(z)).store(z);
    }
  }
}

template <typename T>
void softmax_tile(const Softmax<T>& p, const Position& at, const TileBuffers<T>& buffers) {
  T* const buffer = buffers.get(0);
  const bool has_exps = buffers.whole() && !p.log;
  const auto load = [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, kSoftmaxInput, p.input, p.input_type, at, c, n, buffer);
  };
  BatchSums<T> sums;
  buffers.each_block(p.layout, [&](int64_t c, int64_t n) {
    load(c, n);
    const auto ahead = [&](int64_t) { return Ahead::nothing(buffer); };
    if (has_exps)
      add_tile<false, true>(sums, at.rows, buffer, n, c, buffer, ahead);
    else
      add_tile<false, false>(sums, at.rows, buffer, n, c, buffer, ahead);
  });
  alignas(64) double rest[kTile];
  alignas(64) T log_sum[kTile], inverse_sum[kTile];
  for (int64_t r = 0; r < at.rows; r++) rest[r] = sums.get(r).rest_or_nan();
  for (int64_t r = 0; r < at.rows; r++) inverse_sum[r] = static_cast<T>(1 / (1 + rest[r]));
  if (p.log)
    for (int64_t r = 0; r < at.rows; r += kLanes<double>)
      store_double(Vec<double>::loadu(rest + r).log1p(), log_sum + r);
  buffers.each_block(p.layout, [&](int64_t c, int64_t n) {
    if (!buffers.whole()) load(c, n);
    const auto normalise_each = [&](const auto& value) {
      normalise_tile(sums, log_sum, inverse_sum, at.rows, n, buffer, value);
    };
    if (has_exps)
      normalise_each([](const Normaliser<T>& by, const Vec<T>& e) { return e * by.inverse_sum; });
    else
      normalise_each([&](const Normaliser<T>& by, const Vec<T>& z) { return normalise(p.log, by, z); });
    store_operand_tile(p.layout, kSoftmaxOutput, buffer, p.output, p.output_type, at, c, n, store_of(p));
  });
}

template <typename T>
void softmax_backward_tile(const SoftmaxBackward<T>& p, const Position& at, const TileBuffers<T>& buffers) {
  constexpr int64_t L = kLanes<T>;
  T* const g = buffers.get(0);
  T* const y = buffers.get(1);
  const auto load = [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, kSoftmaxGrad, p.grad_output, p.output_type, at, c, n, g);
    load_operand_tile(p.layout, kSoftmaxOutput, p.output, p.output_type, at, c, n, y);
  };
  alignas(64) double sum[kTile], lost[kTile] = {};
  alignas(64) T total[kTile];
  buffers.each_block(p.layout, [&](int64_t c, int64_t n) {
    load(c, n);
    for (int64_t r = 0; r < at.rows; r += L)
      for (int64_t begin = 0; begin < n; begin += kSummedClasses) {
        Vec<T> s(0);
        for (int64_t i = begin; i < std::min(n, begin + kSummedClasses); i++)
          s = s + backward_summand(p.log, Vec<T>::loadu(g + i * kTile + r), Vec<T>::loadu(y + i * kTile + r));
        add_to(sum + r, lost + r, s, c + begin == 0);
      }
  });
  for (int64_t r = 0; r < at.rows; r++) total[r] = static_cast<T>(sum[r] + lost[r]);
  buffers.each_block(p.layout, [&](int64_t c, int64_t n) {
    if (!buffers.whole()) load(c, n);
    for (int64_t r = 0; r < at.rows; r += L) {
      const Vec<T> row_total = Vec<T>::loadu(total + r);
      for (int64_t i = 0; i < n; i++) {
        T* gi = g + i * kTile + r;
        backward_value(p.log, row_total, Vec<T>::loadu(gi), Vec<T>::loadu(y + i * kTile + r)).store(gi);
      }
    }
    store_operand_tile(p.layout, kSoftmaxInput, g, p.grad_input, p.grad_input_type, at, c, n, store_of(p));
  });
}

// ---- scaling --------------------------------------------------------------------------------------------------------

inline double factor_of(const ScaleRows& p, int64_t row) {
  return inverse_divisor(p.factor) * load_row_value(p.factor, row);
}

// A gradient of 0 stays 0, whatever the factor: that of an ignored row has no part in the loss.
inline double scaled(double value, double factor) { return value == 0 ? 0 : value * factor; }

// In double: one rounding, whatever the dtype.
void scale_row(const ScaleRows& p, const Position& at) {
  BlockBuffer<double> block;
  const double factor = factor_of(p, at.offset[kRow]);
  for (int64_t c = 0; c < p.layout.classes; c += kBlock<double>) {
    const int64_t n = std::min(kBlock<double>, p.layout.classes - c);
    load_run(p.data, p.dtype, at.offset[0] + c, n, block.data);
    for (int64_t i = 0; i < n; i++) block.data[i] = scaled(block.data[i], factor);
    store_run(block.data, n, p.data, p.dtype, at.offset[0] + c);
  }
}

void scale_tile(const ScaleRows& p, const Position& at) {
  BlockBuffer<double> block;
  double factor[kTile] = {};
  for (int64_t r = 0; r < at.rows; r++) factor[r] = factor_of(p, at.offset[kRow] + r * p.layout.inner_stride[kRow]);
  for (int64_t c = 0; c < p.layout.classes; c += kTileClasses<double>) {
    const int64_t n = std::min(kTileClasses<double>, p.layout.classes - c);
    load_operand_tile(p.layout, 0, p.data, p.dtype, at, c, n, block.data);
    for (int64_t i = 0; i < n; i++)
      for (int64_t r = 0; r < at.rows; r++) {
        double& value = block.data[i * kTile + r];
        value = scaled(value, factor[r]);
      }
    store_operand_tile(p.layout, 0, block.data, p.data, p.dtype, at, c, n, Store::kCached);
  }
}

template <typename Params, typename Row, typename Tile>
inline void each_unit(const Params& p, int64_t begin, int64_t end, const Row& row, const Tile& tile) {
  for (int64_t unit = begin; unit < end; unit++) {
    const Position at = locate(p.layout, unit);
    if (p.layout.kind == LayoutKind::kRows)
      row(p, at);
    else
      tile(p, at);
  }
}

template <typename T>
ExpBuffers<T> exp_buffers_of(const Softmax<T>& p, Scratch& scratch) {
  const bool in_output = is_own<T>(p.input_type) && is_own<T>(p.output_type);
  return {p.layout.kind == LayoutKind::kRows && !p.log, in_output, p.layout.classes, 1, scratch};
}

template <typename T>
TileBuffers<T> tile_buffers(const Softmax<T>& p, Scratch& scratch) {
  return {p.layout, 1, scratch};
}
template <typename T>
TileBuffers<T> tile_buffers(const SoftmaxBackward<T>& p, Scratch& scratch) {
  return {p.layout, 2, scratch};
}

template <typename T>
void softmax(const Softmax<T>& p, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  const ExpBuffers<T> exp_buffers = exp_buffers_of(p, scratch);
  const auto row = [&](const Softmax<T>& call, const Position& at) { softmax_row(call, at, exp_buffers); };
  const TileBuffers<T> buffers = tile_buffers(p, scratch);
  const auto tile = [&](const Softmax<T>& call, const Position& at) { softmax_tile(call, at, buffers); };
  each_unit(p, begin, end, row, tile);
  fence_non_temporal();
}

template <typename T>
size_t scratch_of(const Softmax<T>& p) {
  Scratch scratch;
  exp_buffers_of(p, scratch);
  tile_buffers(p, scratch);
  return scratch.bytes();
}

template <typename T>
void softmax_backward(const SoftmaxBackward<T>& p, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  const TileBuffers<T> buffers = tile_buffers(p, scratch);
  const auto tile = [&](const SoftmaxBackward<T>& call, const Position& at) {
    softmax_backward_tile(call, at, buffers);
  };
  each_unit(p, begin, end, softmax_backward_row<T>, tile);
  fence_non_temporal();
}

template <typename T>
size_t scratch_of(const SoftmaxBackward<T>& p) {
  Scratch scratch;
  tile_buffers(p, scratch);
  return scratch.bytes();
}

}  // namespace

size_t scratch_bytes(const Softmax<float>& p) { return scratch_of(p); }
size_t scratch_bytes(const Softmax<double>& p) { return scratch_of(p); }
size_t scratch_bytes(const SoftmaxBackward<float>& p) { return scratch_of(p); }
size_t scratch_bytes(const SoftmaxBackward<double>& p) { return scratch_of(p); }
void softmax_float(const Softmax<float>& p, int64_t begin, int64_t end, void* scratch) {
  softmax(p, begin, end, scratch);
}
void softmax_double(const Softmax<double>& p, int64_t begin, int64_t end, void* scratch) {
  softmax(p, begin, end, scratch);
}
void softmax_backward_float(const SoftmaxBackward<float>& p, int64_t begin, int64_t end, void* scratch) {
  softmax_backward(p, begin, end, scratch);
}
void softmax_backward_double(const SoftmaxBackward<double>& p, int64_t begin, int64_t end, void* scratch) {
  softmax_backward(p, begin, end, scratch);
}
void scale_rows(const ScaleRows& p, int64_t begin, int64_t end) { each_unit(p, begin, end, scale_row, scale_tile); }

void exp_float(const float* x, float* y, int64_t n) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = std::min(L, n - i);
    exp_nonpositive(Vec<float>::loadu(x + i, count)).store(y + i, count);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace softmax_ext
