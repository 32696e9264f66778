// Softmax and log-softmax over the classes, their backward, and the scaling of rows by an upstream gradient.
//
// Forward reads a row once from memory and once from cache, and writes it once. Backward reads the upstream gradient
// and the saved output the same way.
#include "isa_kernels.h"
#include "logsumexp.h"

namespace softmax_ext {
namespace CPU_CAPABILITY {
namespace {

// ---- what is computed for one vector ---------------------------------------------------------------------------------

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

// ---- rows --------------------------------------------------------------------------------------------------------------

// Whole vectors of T itself are read and written where they lie.
template <typename T>
bool is_direct(DType type, int64_t n) {
  return is_own<T>(type) && n % kLanes<T> == 0;
}

// [at, at + n) of an operand, padded to whole vectors.
template <typename T>
const T* load_padded(const void* src, DType type, int64_t at, int64_t n, T padding, Block<T>& block) {
  const int64_t padded = round_up(n, kLanes<T>);
  if (is_direct<T>(type, n)) return static_cast<const T*>(src) + at;
  load_run(src, type, at, n, block.data);
  for (int64_t i = n; i < padded; i++) block.data[i] = padding;
  return block.data;
}

// [at, at + n) of an operand = value(i), vector by vector.
template <typename T, typename Value>
void write_run(void* dst, DType type, int64_t at, int64_t n, Block<T>& block, const Value& value) {
  const bool direct = is_direct<T>(type, n);
  T* out = direct ? static_cast<T*>(dst) + at : block.data;
  for (int64_t i = 0; i < n; i += kLanes<T>) value(i).store(out + i);
  if (!direct) store_run(out, n, dst, type, at);
}

// The exponentials are kept in the output where it is of type T, until their sum is known.
template <typename T>
void softmax_row(const Softmax<T>& p, const Position& at) {
  constexpr int64_t L = kLanes<T>;
  Block<T> z_block, out_block;
  const auto each_block = [&](const auto& visit) {
    for (int64_t c = 0, n; c < p.layout.classes; c += n) {
      n = next_block<T>(p.layout.classes - c, is_own<T>(p.input_type));
      visit(load_padded(p.input, p.input_type, at.offset[kSoftmaxInput] + c, n, -kInfinity<T>, z_block), n, c);
    }
  };
  LogSumExp<T> sums;
  each_block([&](const T* z, int64_t n, int64_t c) {
    const int64_t padded = round_up(n, L), excluded = follow_max<false>(sums, z, padded, c);
    const Ahead ahead = ahead_of<T>(p.input, p.input_type, at.offset[kSoftmaxInput] + c + n);
    add_block<false, false>(sums, z, padded, excluded, static_cast<T*>(nullptr), ahead);
  });
  const double rest = sums.rest_or_nan();
  const Normaliser<T> by{Vec<T>(sums.max), Vec<T>(static_cast<T>(std::log1p(rest))),
                         Vec<T>(static_cast<T>(1 / (1 + rest)))};
  each_block([&](const T* z, int64_t n, int64_t c) {
    write_run(p.output, p.output_type, at.offset[kSoftmaxOutput] + c, n, out_block,
              [&](int64_t i) { return normalise(p.log, by, Vec<T>::loadu(z + i)); });
  });
}

template <typename T>
void softmax_backward_row(const SoftmaxBackward<T>& p, const Position& at) {
  constexpr int64_t L = kLanes<T>;
  Block<T> g_block, y_block, out_block;
  const auto each_block = [&](const auto& visit) {
    for (int64_t c = 0, n; c < p.layout.classes; c += n) {
      n = next_block<T>(p.layout.classes - c, is_own<T>(p.output_type));
      const T* g = load_padded(p.grad_output, p.output_type, at.offset[kSoftmaxGrad] + c, n, T(0), g_block);
      const T* y = load_padded(p.output, p.output_type, at.offset[kSoftmaxOutput] + c, n, T(0), y_block);
      visit(g, y, n, c);
    }
  };
  double sum = 0;
  each_block([&](const T* g, const T* y, int64_t n, int64_t) {
    Vec<T> s[2] = {Vec<T>(0), Vec<T>(0)};
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L)
      for (int k = 0; k < 2; k++)
        s[k] = s[k] + backward_summand(p.log, Vec<T>::loadu(g + i + k * L), Vec<T>::loadu(y + i + k * L));
    for (; i < n; i += L) s[0] = s[0] + backward_summand(p.log, Vec<T>::loadu(g + i), Vec<T>::loadu(y + i));
    sum += sum_lanes(s[0] + s[1]);
  });
  const Vec<T> total(static_cast<T>(sum));
  each_block([&](const T* g, const T* y, int64_t n, int64_t c) {
    write_run(p.grad_input, p.grad_input_type, at.offset[kSoftmaxInput] + c, n, out_block,
              [&](int64_t i) { return backward_value(p.log, total, Vec<T>::loadu(g + i), Vec<T>::loadu(y + i)); });
  });
}

// ---- columns -----------------------------------------------------------------------------------------------------------

// Calls visit(first class, classes) for each block of a tile.
template <typename T, typename Visit>
inline void each_tile_block(const Layout& layout, const Visit& visit) {
  for (int64_t c = 0; c < layout.classes; c += kTileClasses<T>) visit(c, std::min(kTileClasses<T>, layout.classes - c));
}

template <typename T>
void load_operand_tile(const Layout& layout, int operand, const void* src, DType type, const Position& at,
                       int64_t first, int64_t classes, Block<T>& block) {
  load_tile(src, type, at.offset[operand] + first * layout.class_stride[operand], layout.class_stride[operand],
            layout.inner_stride[operand], classes, at.rows, block.data);
}

template <typename T>
void store_operand_tile(const Layout& layout, int operand, const Block<T>& block, void* dst, DType type,
                        const Position& at, int64_t first, int64_t classes) {
  store_tile(block.data, dst, type, at.offset[operand] + first * layout.class_stride[operand],
             layout.class_stride[operand], layout.inner_stride[operand], classes, at.rows);
}

template <typename T>
void softmax_tile(const Softmax<T>& p, const Position& at) {
  constexpr int64_t L = kLanes<T>;
  Block<T> block{};
  RowSums<T> sums;
  each_tile_block<T>(p.layout, [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, kSoftmaxInput, p.input, p.input_type, at, c, n, block);
    for (int64_t r = 0; r < at.rows; r += L)
      add_columns<false, false>(sums, r, block.data + r, kTile, n, c, static_cast<T*>(nullptr), Ahead());
  });
  alignas(64) T log_sum[kTile], inverse_sum[kTile];
  for (int64_t r = 0; r < at.rows; r++) {
    const double rest = sums.get(r).rest_or_nan();
    log_sum[r] = static_cast<T>(p.log ? std::log1p(rest) : 0);
    inverse_sum[r] = static_cast<T>(1 / (1 + rest));
  }
  each_tile_block<T>(p.layout, [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, kSoftmaxInput, p.input, p.input_type, at, c, n, block);
    for (int64_t r = 0; r < at.rows; r += L) {
      const Normaliser<T> by{Vec<T>::loadu(sums.max + r), Vec<T>::loadu(log_sum + r), Vec<T>::loadu(inverse_sum + r)};
      for (int64_t i = 0; i < n; i++) {
        T* z = block.data + i * kTile + r;
        normalise(p.log, by, Vec<T>::loadu(z)).store(z);
      }
    }
    store_operand_tile(p.layout, kSoftmaxOutput, block, p.output, p.output_type, at, c, n);
  });
}

template <typename T>
void softmax_backward_tile(const SoftmaxBackward<T>& p, const Position& at) {
  constexpr int64_t L = kLanes<T>;
  Block<T> g_block{}, y_block{};
  double sum[kTile] = {};
  const auto load = [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, kSoftmaxGrad, p.grad_output, p.output_type, at, c, n, g_block);
    load_operand_tile(p.layout, kSoftmaxOutput, p.output, p.output_type, at, c, n, y_block);
  };
  alignas(64) T lanes[kTile];
  each_tile_block<T>(p.layout, [&](int64_t c, int64_t n) {
    load(c, n);
    for (int64_t r = 0; r < at.rows; r += L) {
      Vec<T> s(0);
      for (int64_t i = 0; i < n; i++)
        s = s + backward_summand(p.log, Vec<T>::loadu(g_block.data + i * kTile + r),
                                 Vec<T>::loadu(y_block.data + i * kTile + r));
      s.store(lanes + r);
      for (int64_t k = r; k < r + L; k++) sum[k] += lanes[k];
    }
  });
  for (int64_t r = 0; r < kTile; r++) lanes[r] = static_cast<T>(sum[r]);
  each_tile_block<T>(p.layout, [&](int64_t c, int64_t n) {
    load(c, n);
    for (int64_t r = 0; r < at.rows; r += L) {
      const Vec<T> total = Vec<T>::loadu(lanes + r);
      for (int64_t i = 0; i < n; i++) {
        T* g = g_block.data + i * kTile + r;
        backward_value(p.log, total, Vec<T>::loadu(g), Vec<T>::loadu(y_block.data + i * kTile + r)).store(g);
      }
    }
    store_operand_tile(p.layout, kSoftmaxInput, g_block, p.grad_input, p.grad_input_type, at, c, n);
  });
}

// ---- scaling -------------------------------------------------------------------------------------------------------------

inline double factor_of(const ScaleRows& p, int64_t row) {
  return p.factor.scale * load_value(p.factor.data, p.factor.type, row * p.factor.stride);
}

// A gradient of 0 stays 0, whatever the factor: that of an ignored row has no part in the loss.
inline double scaled(double value, double factor) { return value == 0 ? 0 : value * factor; }

// In double: one rounding, whatever the dtype.
void scale_row(const ScaleRows& p, const Position& at) {
  Block<double> block;
  const double factor = factor_of(p, at.offset[kRow]);
  for (int64_t c = 0; c < p.layout.classes; c += kBlock<double>) {
    const int64_t n = std::min(kBlock<double>, p.layout.classes - c);
    load_run(p.data, p.type, at.offset[0] + c, n, block.data);
    for (int64_t i = 0; i < n; i++) block.data[i] = scaled(block.data[i], factor);
    store_run(block.data, n, p.data, p.type, at.offset[0] + c);
  }
}

void scale_tile(const ScaleRows& p, const Position& at) {
  Block<double> block;
  double factor[kTile] = {};
  for (int64_t r = 0; r < at.rows; r++) factor[r] = factor_of(p, at.offset[kRow] + r * p.layout.inner_stride[kRow]);
  each_tile_block<double>(p.layout, [&](int64_t c, int64_t n) {
    load_operand_tile(p.layout, 0, p.data, p.type, at, c, n, block);
    for (int64_t i = 0; i < n; i++)
      for (int64_t r = 0; r < at.rows; r++) {
        double& value = block.data[i * kTile + r];
        value = scaled(value, factor[r]);
      }
    store_operand_tile(p.layout, 0, block, p.data, p.type, at, c, n);
  });
}

template <typename Params, typename Row, typename Tile>
inline void each_unit(const Params& p, int64_t begin, int64_t end, const Row& row, const Tile& tile) {
  for (int64_t unit = begin; unit < end; unit++) {
    const Position at = locate(p.layout, unit);
    if (p.layout.rows)
      row(p, at);
    else
      tile(p, at);
  }
}

}  // namespace

void softmax_float(const Softmax<float>& p, int64_t begin, int64_t end) {
  each_unit(p, begin, end, softmax_row<float>, softmax_tile<float>);
}
void softmax_double(const Softmax<double>& p, int64_t begin, int64_t end) {
  each_unit(p, begin, end, softmax_row<double>, softmax_tile<double>);
}
void softmax_backward_float(const SoftmaxBackward<float>& p, int64_t begin, int64_t end) {
  each_unit(p, begin, end, softmax_backward_row<float>, softmax_backward_tile<float>);
}
void softmax_backward_double(const SoftmaxBackward<double>& p, int64_t begin, int64_t end) {
  each_unit(p, begin, end, softmax_backward_row<double>, softmax_backward_tile<double>);
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
