// What is measured: the inputs, the passes over them, and the bytes that each has to move.
#pragma once

#include <string>
#include <vector>

#include "../../csrc/params.h"

namespace gpu_times {

using softmax_ext::DType;

// Logits [batch, classes, inner], contiguous.
struct Case {
  int64_t batch, classes, inner;
  DType type;
  bool options = false;  // each option of cross entropy is measured too
  bool tiny = false;     // for a test of the program

  int64_t rows() const { return batch * inner; }
  int64_t elements() const { return rows() * classes; }
  int64_t bytes() const { return elements() * softmax_ext::size_of(type); }
  std::string name() const {
    const std::string last = inner > 1 ? "x" + std::to_string(inner) : "";
    return (tiny ? "tiny-" : "") + std::to_string(batch) + "x" + std::to_string(classes) + last +
           (type == DType::kFloat32 ? "-f32" : "-bf16");
  }
};

inline std::vector<Case> all_cases(bool tiny) {
  const std::vector<Case> shapes =
      tiny ? std::vector<Case>{{5, 2101, 1, {}, true, true}, {9, 10, 1, {}, false, true}, {2, 21, 33, {}, false, true}}
           : std::vector<Case>{{8192, 128256, 1, {}}, {4096, 262144, 1, {}}, {4096, 32000, 1, {}, true},
                               {2048, 32000, 1, {}},  {2048, 50257, 1, {}},  {65536, 1000, 1, {}},
                               {1000000, 10, 1, {}},  {8, 21, 512 * 512, {}}};
  std::vector<Case> cases;
  for (Case one : shapes)
    for (const DType type : {DType::kBFloat16, DType::kFloat32}) {
      one.type = type;
      cases.push_back(one);
    }
  return cases;
}

struct Option {
  std::string name;  // empty: none
  double smoothing = 0, z_loss = 0, softcap = 0;
  bool weight = false, probabilities = false, stats = false;
};

inline std::vector<Option> all_options() {
  std::vector<Option> options(6);
  options[0].name = "smoothing", options[0].smoothing = 0.1;
  options[1].name = "weight", options[1].weight = true;
  options[2].name = "z_loss", options[2].z_loss = 1e-4;
  options[3].name = "softcap", options[3].softcap = 30;
  options[4].name = "probabilities", options[4].probabilities = true;
  options[5].name = "stats", options[5].stats = true;
  return options;
}

enum class Kind { kCopy, kForward, kBackward, kFused, kInPlace, kSoftmax, kSoftmaxBackward };

struct Pass {
  Kind kind;
  Option option = {};
  bool log = false;  // of softmax

  bool is_forward() const { return kind == Kind::kForward || kind == Kind::kFused || kind == Kind::kInPlace; }
  bool is_cross_entropy() const { return is_forward() || kind == Kind::kBackward; }
  std::string name() const {
    const std::string softmax = log ? "log_softmax" : "softmax";
    const std::string with = option.name.empty() ? "" : ", " + option.name;
    switch (kind) {
      case Kind::kCopy: return "copy";
      case Kind::kForward: return "forward" + with;
      case Kind::kBackward: return "backward" + with;
      case Kind::kFused: return "fused" + with;
      case Kind::kInPlace: return "fused in place" + with;
      case Kind::kSoftmax: return softmax;
      case Kind::kSoftmaxBackward: return softmax + " backward";
    }
    return "";
  }
};

inline std::vector<Pass> all_passes(const Case& one) {
  std::vector<Pass> passes;
  for (const Kind kind : {Kind::kForward, Kind::kBackward, Kind::kFused, Kind::kInPlace}) passes.push_back({kind});
  for (const Kind kind : {Kind::kSoftmax, Kind::kSoftmaxBackward})
    for (const bool log : {false, true}) passes.push_back({kind, {}, log});
  if (one.options)
    for (const Option& option : all_options())
      for (const Kind kind : {Kind::kForward, Kind::kBackward, Kind::kFused}) passes.push_back({kind, option});
  return passes;
}

// Read and written once each: the tensors of the logits' shape, a class of 8 bytes for each row, its state and what is
// asked of it. Not the losses, of which the mean alone is wanted.
inline int64_t bytes_moved(const Case& one, const Pass& pass) {
  int64_t tensors = 2, each_row = 0;
  if (pass.kind == Kind::kForward) tensors = 1;
  if (pass.kind == Kind::kSoftmaxBackward) tensors = 3;
  if (pass.is_cross_entropy()) {
    if (pass.option.probabilities)
      tensors++;
    else
      each_row += 8;
    if (pass.kind == Kind::kForward || pass.kind == Kind::kBackward) each_row += pass.option.probabilities ? 16 : 8;
    if (pass.is_forward() && pass.option.stats) each_row += 3 * 4 + 8;
  }
  return tensors * one.bytes() + each_row * one.rows();
}

}  // namespace gpu_times
