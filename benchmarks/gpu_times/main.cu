// Times the CUDA kernels by themselves, without torch, and checks each against float64: make gpu-times.
//
//   gpu_times [--case NAME] [--pass NAME] [--csv FILE]
//
// A name is a part of a case's or a pass's; --case tiny runs a few small cases, for a test of this program. A pass does
// what the operator does: the mean of the losses and its denominator are a part of it. Inputs are drawn on the device;
// several buffers take turns, so that none is in the L2 cache when its turn comes. Of each pass the median of some turns
// is shown beside the bytes that it has to move, and the speed of a copy on the device in the same run.
//
// Exit status: 0, 1 where a result is wrong or CUDA fails, 2 where there is no GPU or nothing has such a name.
#include <stdlib.h>

#include <cmath>
#include <cstdio>
#include <exception>

#include "../../csrc/cuda/kernels.h"
#include "device.h"
#include "reference.h"
#include "report.h"

namespace gpu_times {
namespace {

namespace kernels = softmax_ext::cuda;
using softmax_ext::CrossEntropyParams;
using softmax_ext::Layout;
using softmax_ext::LayoutKind;
using softmax_ext::OuterDim;

constexpr int64_t kIgnored = -100;
constexpr int kCheckedRows = 5;
constexpr double kMeanTolerance = 1e-6;  // of a float, relative to the sum of the losses of the same kernel

// ---- the buffers of a case -------------------------------------------------------------------------------------------

struct Buffers {
  Memory logits, output;
  Memory saved;  // the output of softmax: what its backward reads, and probabilities
  Memory state;
};

// What a softmax or a cross entropy is given, of one case.
struct Data {
  Case one;
  cudaStream_t stream;
  std::vector<Buffers> buffers;
  std::vector<int64_t> target_values;
  std::vector<float> weight_values;
  Memory target, weight;
  Memory loss, lse, nll, entropy, prediction;  // of each row
  Memory total, mean, upstream, scratch, loss_scratch;

  Data(const Case& one, int count, cudaStream_t stream)
      : one(one),
        stream(stream),
        target_values(draw_targets(one)),
        weight_values(draw_weights(one)),
        target(on_device(target_values, stream)),
        weight(on_device(weight_values, stream)),
        loss(4 * one.rows()),
        lse(4 * one.rows()),
        nll(4 * one.rows()),
        entropy(4 * one.rows()),
        prediction(8 * one.rows()),
        total(8),
        mean(4),
        upstream(on_device<float>({1}, stream)),
        scratch(8 * kernels::kSumScratch),
        loss_scratch(64 * one.rows() + 8192) {
    for (int i = 0; i < count; i++)
      buffers.push_back({Memory(one.bytes()), Memory(one.bytes()), Memory(one.bytes()), Memory(16 * one.rows())});
    draw_logits();
  }

  static std::vector<int64_t> draw_targets(const Case& one) {
    std::vector<int64_t> targets(static_cast<size_t>(one.rows()));
    for (size_t row = 0; row < targets.size(); row++)
      targets[row] = static_cast<int64_t>((row + 1) * 0x9e3779b97f4a7c15ull >> 33) % one.classes;
    return targets;
  }
  static std::vector<float> draw_weights(const Case& one) {
    std::vector<float> weights(static_cast<size_t>(one.classes));
    for (size_t c = 0; c < weights.size(); c++) weights[c] = 0.5f + 0.125f * static_cast<float>(c % 9);
    return weights;
  }

  int count() const { return static_cast<int>(buffers.size()); }
  const Buffers& of_turn(int turn) const { return buffers[static_cast<size_t>(turn % count())]; }
  void draw_into(const Memory& memory, int seed) const {
    with_elements(memory, one.type, [&](auto* to) {
      launch(draw<std::remove_pointer_t<decltype(to)>>, one.elements(), stream, to, one.elements(), seed);
    });
  }
  void draw_logits() const {
    for (int i = 0; i < count(); i++) draw_into(of_turn(i).logits, i);
  }
  // By the host: what a weighted or plain mean is divided by.
  double exact_total(const Option& option) const {
    if (!option.weight) return static_cast<double>(one.rows());
    double sum = 0;
    for (const int64_t y : target_values) sum += weight_values[static_cast<size_t>(y)];
    return sum;
  }
};

// Buffers that fill the L2 cache eight times, as far as memory and 16 of them reach; less than 1: not one fits.
int buffers_of(const Case& one) {
  const int64_t cache = attribute(cudaDevAttrL2CacheSize), each = 3 * one.bytes() + 16 * one.rows();
  size_t free_bytes = 0, all_bytes = 0;
  GPU_TIMES_CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
  const int64_t fit = (static_cast<int64_t>(free_bytes) - 40 * one.rows()) * 9 / 10 / each;
  const int64_t wanted = one.tiny ? 2 : std::min<int64_t>(16, 1 + 8 * cache / one.bytes());
  return static_cast<int>(std::min(fit, wanted));
}

// ---- calls -----------------------------------------------------------------------------------------------------------

// As csrc/ops/tensors.cpp makes it, of the first `operands` tensors of the logits' shape.
class CaseLayout {
 public:
  CaseLayout(const Case& one, int operands) {
    layout_.classes = one.classes;
    layout_.kind = one.inner == 1 && one.classes > kernels::kSmallClasses ? LayoutKind::kRows : LayoutKind::kColumns;
    const bool by_rows = layout_.kind == LayoutKind::kRows;
    const bool batch_is_inner = !by_rows && one.inner == 1;
    layout_.inner = batch_is_inner ? one.batch : one.inner;
    layout_.outer = one.rows() / layout_.inner;
    layout_.outer_dims = layout_.outer > 1 ? 1 : 0;
    layout_.dims = &dim_;
    dim_.size = one.batch;
    dim_.stride[softmax_ext::kRow] = one.inner;
    layout_.inner_stride[softmax_ext::kRow] = by_rows ? 0 : 1;
    for (int i = 0; i < operands; i++) {
      dim_.stride[i] = one.classes * one.inner;
      layout_.class_stride[i] = one.inner;
      layout_.inner_stride[i] = by_rows ? 0 : batch_is_inner ? one.classes : 1;
    }
  }
  CaseLayout(const CaseLayout&) = delete;  // the layout points into it
  CaseLayout& operator=(const CaseLayout&) = delete;

  const Layout& get() const { return layout_; }

 private:
  Layout layout_{};
  OuterDim dim_{};
};

// With the sum or the mean of the losses, unless `sum` is null: then params.loss gets that of each row.
void cross_entropy(const Data& data, const CrossEntropyParams<float>& params, const Layout& layout,
                   const kernels::LossSum* sum) {
  if (!sum) return kernels::cross_entropy(params, layout, nullptr, data.stream);
  CrossEntropyParams<float> summed = params;
  summed.loss = nullptr;
  kernels::cross_entropy(summed, layout, sum, data.stream);
}

CrossEntropyParams<float> params_of(const Data& data, const Pass& pass, const Buffers& buffers) {
  const Option& option = pass.option;
  CrossEntropyParams<float> p{};
  p.logits = buffers.logits.as<void>();
  p.logits_type = p.probabilities_type = data.one.type;
  p.has_probabilities = option.probabilities;
  if (option.probabilities)
    p.probabilities = buffers.saved.as<void>();
  else
    p.index = data.target.as<int64_t>();
  if (option.weight) p.weight = data.weight.as<float>();
  p.options = {1, softmax_ext::kMean, kIgnored, 0, 0, 0, 1, false, false};
  p.options.label_smoothing = static_cast<float>(option.smoothing);
  p.options.z_loss = static_cast<float>(option.z_loss);
  p.options.softcap = static_cast<float>(option.softcap);
  p.rows = data.one.rows();
  p.all_classes = data.one.classes;
  p.forward = pass.is_forward();
  if (pass.kind == Kind::kForward || pass.kind == Kind::kBackward) p.state = buffers.state.as<float>();
  if (p.forward) {
    p.loss = data.loss.as<void>();
    p.loss_type = DType::kFloat32;
    p.stats = option.stats;
  }
  if (p.stats) {
    p.lse = data.lse.as<float>();
    p.nll = data.nll.as<float>();
    p.entropy = data.entropy.as<float>();
    p.prediction = data.prediction.as<int64_t>();
  }
  if (pass.kind == Kind::kForward) return p;
  p.grad_logits = (pass.kind == Kind::kInPlace ? buffers.logits : buffers.output).as<void>();
  const void* upstream = p.forward ? nullptr : data.upstream.as<void>();
  p.grad_loss = {upstream, DType::kFloat32, 0, data.total.as<double>(), true};
  return p;
}

// As csrc/ops/cuda/cross_entropy.cpp calls the kernels for a mean. Without the mean: the losses of the rows.
void call_cross_entropy(const Data& data, const Pass& pass, const Buffers& buffers, bool with_mean) {
  const CrossEntropyParams<float> params = params_of(data, pass, buffers);
  const bool divides = pass.kind == Kind::kFused || pass.kind == Kind::kInPlace;
  const CaseLayout layout(data.one, pass.option.probabilities ? 3 : pass.kind == Kind::kForward ? 1 : 2);
  double* const total = data.total.as<double>();
  if (divides) kernels::sum_targets(params, data.one.classes, total, data.scratch.as<double>(), data.stream);
  const kernels::LossSum mean{data.mean.as<void>(),        DType::kFloat32, true, total, divides,
                              data.loss_scratch.as<void>()};
  cross_entropy(data, params, layout.get(), with_mean && pass.is_forward() ? &mean : nullptr);
}

void call_softmax(const Data& data, bool log, const Memory& input, const Memory& output) {
  const CaseLayout layout(data.one, 2);
  kernels::softmax({log, input.as<void>(), data.one.type, output.as<void>(), data.one.type}, layout.get(), data.stream);
}

// The logits stand for the upstream gradient.
void call_softmax_backward(const Data& data, bool log, const Buffers& buffers) {
  const CaseLayout layout(data.one, 3);
  kernels::softmax_backward({log, buffers.logits.as<void>(), buffers.saved.as<void>(), data.one.type,
                             buffers.output.as<void>(), data.one.type},
                            layout.get(), data.stream);
}

void call(const Data& data, const Pass& pass, int turn) {
  const Buffers& buffers = data.of_turn(turn);
  switch (pass.kind) {
    case Kind::kCopy:
      return GPU_TIMES_CHECK(cudaMemcpyAsync(buffers.output.as<void>(), buffers.logits.as<void>(),
                                             static_cast<size_t>(data.one.bytes()), cudaMemcpyDeviceToDevice,
                                             data.stream));
    case Kind::kSoftmax: return call_softmax(data, pass.log, buffers.logits, buffers.output);
    case Kind::kSoftmaxBackward: return call_softmax_backward(data, pass.log, buffers);
    default: return call_cross_entropy(data, pass, buffers, true);
  }
}

// What the pass finds there: the saved softmax, of other logits, the state and the denominator.
void prepare(const Data& data, const Pass& pass) {
  const Pass forward{Kind::kForward, pass.option};
  for (int i = 0; i < data.count(); i++) {
    const Buffers& buffers = data.of_turn(i);
    if (pass.option.probabilities || pass.kind == Kind::kSoftmaxBackward) {
      data.draw_into(buffers.output, data.count() + i);
      call_softmax(data, pass.log, buffers.output, buffers.saved);
    }
    if (pass.kind == Kind::kBackward) call_cross_entropy(data, forward, buffers, true);
  }
}

// ---- what is right ---------------------------------------------------------------------------------------------------

struct Errors {
  double loss = 0, gradient = 0;
};

int64_t checked_row(const Case& one, int k) { return (one.rows() - 1) * k / (kCheckedRows - 1); }

std::vector<double> row_of(const Data& data, const Memory& memory, int k) {
  return row_on_host(memory, data.one, checked_row(data.one, k), data.stream);
}

ExactRow exact_row(const Data& data, const Pass& pass, const std::vector<double>& logits, int k) {
  std::vector<double> target(logits.size()), weight;
  if (pass.option.probabilities)
    target = row_of(data, data.of_turn(0).saved, k);
  else
    target[static_cast<size_t>(data.target_values[static_cast<size_t>(checked_row(data.one, k))])] = 1;
  if (pass.option.weight) weight.assign(data.weight_values.begin(), data.weight_values.end());
  return cross_entropy_row(logits, target, weight, pass.option, data.exact_total(pass.option));
}

// The losses and statistics of all rows are numbers, and those of some rows right.
double error_of_rows(const Data& data, const Pass& pass, const std::vector<ExactRow>& exact) {
  const int64_t rows = data.one.rows();
  std::vector<const Memory*> memories{&data.loss};
  if (pass.option.stats) memories = {&data.loss, &data.lse, &data.nll, &data.entropy};
  double worst = 0;
  for (size_t m = 0; m < memories.size(); m++) {
    const std::vector<float> values = on_host<float>(*memories[m], rows, data.stream);
    for (const float value : values) worst = worse(worst, std::isnan(value) ? NAN : 0);
    for (int k = 0; k < kCheckedRows; k++) {
      const Exact& numbers = exact[static_cast<size_t>(k)].numbers;
      const double found = values[static_cast<size_t>(checked_row(data.one, k))];
      worst = worse(worst, std::fabs(found - numbers.value[m]) / numbers.scale[m]);
    }
  }
  if (!pass.option.stats) return worst;
  const std::vector<int64_t> predictions = on_host<int64_t>(data.prediction, rows, data.stream);
  for (int k = 0; k < kCheckedRows; k++)
    if (predictions[static_cast<size_t>(checked_row(data.one, k))] != exact[static_cast<size_t>(k)].prediction)
      worst = NAN;
  return worst;
}

// The mean, beside the losses of the rows that the same kernel gave.
double error_of_mean(const Data& data, const Pass& pass, const std::vector<float>& losses) {
  double sum = 0;
  for (const float loss : losses) sum += loss;
  const double exact = sum / data.exact_total(pass.option);
  return std::fabs(on_host<float>(data.mean, 1, data.stream)[0] - exact) / std::fabs(exact);
}

// Buffer 0, calculated anew into poisoned memory. `right` is made false where an error is beyond its tolerance.
Errors check_pass(const Data& data, const Pass& pass, bool& right) {
  const Buffers& buffers = data.of_turn(0);
  const Memory& output = pass.kind == Kind::kInPlace ? buffers.logits : buffers.output;
  const auto poison = [&] {
    for (const Memory* memory :
         {&buffers.output, &data.loss, &data.lse, &data.nll, &data.entropy, &data.prediction, &data.mean})
      memory->poison(data.stream);
    if (pass.kind == Kind::kInPlace) data.draw_logits();
    if (pass.kind == Kind::kFused || pass.kind == Kind::kInPlace) data.total.poison(data.stream);
  };
  poison();
  Errors errors;
  std::vector<Exact> exact;
  std::vector<ExactRow> rows;
  for (int k = 0; k < kCheckedRows; k++) {
    const std::vector<double> logits = row_of(data, buffers.logits, k);
    if (pass.is_cross_entropy()) {
      rows.push_back(exact_row(data, pass, logits, k));
      exact.push_back(rows.back().gradient);
    } else if (pass.kind == Kind::kSoftmax) {
      exact.push_back(softmax_row(logits, pass.log));
    } else {
      exact.push_back(softmax_backward_row(logits, row_of(data, buffers.saved, k), pass.log));
    }
  }
  std::vector<float> losses;
  if (pass.is_forward()) {
    call_cross_entropy(data, pass, buffers, false);
    losses = on_host<float>(data.loss, data.one.rows(), data.stream);
    errors.loss = error_of_rows(data, pass, rows);
    poison();
  }
  call(data, pass, 0);
  GPU_TIMES_CHECK(cudaStreamSynchronize(data.stream));
  if (pass.is_forward()) {
    const double error = error_of_mean(data, pass, losses);
    right = right && error <= kMeanTolerance;
    errors.loss = worse(errors.loss, error);
  }
  if (pass.kind != Kind::kForward) {
    for (int k = 0; k < kCheckedRows; k++)
      errors.gradient = worse(errors.gradient, largest_error(row_of(data, output, k), exact[static_cast<size_t>(k)]));
    if (nans_in(output, data.one.type, data.one.elements(), data.stream) != 0) errors.gradient = NAN;
  }
  right = right && errors.loss <= tolerance(DType::kFloat32) && errors.gradient <= tolerance(data.one.type);
  return errors;
}

// ---- the program -----------------------------------------------------------------------------------------------------

Result measure(const Data& data, const Pass& pass, double copy_ms) {
  constexpr double kMs = 20, kHeldBytes = 4e9;  // of a pass; of memory to be set, in about a millisecond
  constexpr int kWarmUps = 2;
  const auto hold = [&] {
    const double all = static_cast<double>(data.count()) * static_cast<double>(data.one.bytes());
    for (int i = 0; i < data.count() * std::min(64, 1 + static_cast<int>(kHeldBytes / all)); i++)
      data.of_turn(i).output.poison(data.stream);
  };
  prepare(data, pass);
  for (int turn = 0; turn < kWarmUps; turn++) call(data, pass, turn);
  const int turns = data.one.tiny ? 2 : copy_ms > 0 ? std::clamp(static_cast<int>(kMs / copy_ms), 7, 31) : 15;
  Result result;
  result.ms = median_ms([&](int turn) { call(data, pass, turn); }, turns, hold, data.stream);
  result.launches = count_launches([&] { call(data, pass, 0); }, data.stream);
  if (pass.kind == Kind::kCopy) return result;
  const Errors errors = check_pass(data, pass, result.right);
  result.loss_error = errors.loss;
  result.gradient_error = errors.gradient;
  if (pass.kind == Kind::kInPlace) data.draw_logits();
  return result;
}

// The first line that a command prints; empty where it cannot be run.
std::string first_line(const char* command) {
  std::string line;
  if (std::FILE* pipe = popen(command, "r")) {
    char text[256];
    if (std::fgets(text, sizeof text, pipe)) line = text;
    pclose(pipe);
  }
  while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
  return line;
}

Machine machine() {
  const auto or_unknown = [](const std::string& text) { return text.empty() ? "unknown" : text; };
  cudaDeviceProp properties;
  int cuda = 0;
  GPU_TIMES_CHECK(cudaGetDeviceProperties(&properties, 0));
  GPU_TIMES_CHECK(cudaRuntimeGetVersion(&cuda));
  const char* commit = getenv("SOFTMAX_EXT_COMMIT");
  const std::string ask = "nvidia-smi -i 0 --format=csv,noheader 2>/dev/null --query-gpu=";
  return {properties.name, or_unknown(first_line((ask + "driver_version").c_str())),
          std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10),
          std::to_string(attribute(cudaDevAttrClockRate) / 1000) + " MHz at most",
          or_unknown(commit ? commit : first_line("git describe --always --dirty 2>/dev/null"))};
}

struct Arguments {
  std::string part_of_case, part_of_pass, csv;
};

// False where they are wrong.
bool parse(int argc, char** argv, Arguments& arguments) {
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    std::string* const to = name == "--case"   ? &arguments.part_of_case
                            : name == "--pass" ? &arguments.part_of_pass
                            : name == "--csv"  ? &arguments.csv
                                               : nullptr;
    if (!to || i + 1 == argc) return false;
    *to = argv[i + 1];
  }
  return true;
}

void measure_case(const Case& one, const std::vector<Pass>& passes, Report& report, cudaStream_t stream) {
  const int count = buffers_of(one);
  if (count < 1) {
    std::printf("%-20s left out: it does not fit into the GPU's memory\n", one.name().c_str());
    return;
  }
  const Data data(one, count, stream);
  double copy_ms = 0;
  for (const Pass& pass : passes) {
    const Result result = measure(data, pass, copy_ms);
    if (pass.kind == Kind::kCopy) copy_ms = result.ms;
    report.add(one, pass, result);
  }
}

int run(const Arguments& arguments) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "gpu_times: there is no GPU here\n");
    return 2;
  }
  cudaStream_t stream;
  GPU_TIMES_CHECK(cudaStreamCreate(&stream));
  Report report(machine(), arguments.csv);
  const auto has = [](const std::string& name, const std::string& part) { return name.find(part) != name.npos; };
  for (const Case& one : all_cases(arguments.part_of_case.rfind("tiny", 0) == 0)) {
    if (!has(one.name(), arguments.part_of_case)) continue;
    std::vector<Pass> passes{{Kind::kCopy}};
    for (const Pass& pass : all_passes(one))
      if (has(pass.name(), arguments.part_of_pass)) passes.push_back(pass);
    if (passes.size() > 1) measure_case(one, passes, report, stream);
  }
  GPU_TIMES_CHECK(cudaStreamDestroy(stream));
  if (report.rows() == 0) {
    std::fprintf(stderr, "gpu_times: nothing is measured: no case or no pass has such a name\n");
    return 2;
  }
  if (report.wrong()) std::fprintf(stderr, "gpu_times: %d results are wrong\n", report.wrong());
  return report.wrong() ? 1 : 0;
}

}  // namespace
}  // namespace gpu_times

int main(int argc, char** argv) {
  gpu_times::Arguments arguments;
  if (!gpu_times::parse(argc, argv, arguments)) {
    std::fprintf(stderr, "usage: gpu_times [--case NAME] [--pass NAME] [--csv FILE]\n");
    return 2;
  }
  try {
    return gpu_times::run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_times: %s\n", error.what());
    return 1;
  }
}
