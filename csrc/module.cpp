// The Python module softmax_ext._C: what was built, and the choice of the instruction set. The operators live in the
// same library and register themselves when it is loaded. No torch header is included here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace {

std::vector<std::string> compiled_isas() {
  int count = 0;
  const char* const* names = softmax_ext::compiled_isas(&count);
  return {names, names + count};
}

std::vector<std::string> available_isas() {
  std::vector<std::string> available;
  for (const std::string& name : compiled_isas())
    if (softmax_ext::isa_available(name.c_str())) available.push_back(name);
  return available;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void select_isa(const std::string& name) {
  if (!softmax_ext::select_isa(name.c_str()))
    throw std::invalid_argument("select_isa: isa must be one of " + join(available_isas()) + "; got " + name + ".");
}

// The kernels' exponential of each x <= 0.
std::vector<float> exp_nonpositive(const std::vector<float>& x) {
  std::vector<float> y(x.size());
  softmax_ext::kernels().exp_float(x.data(), y.data(), static_cast<int64_t>(x.size()));
  return y;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "softmax_ext's CPU kernels: build information and the choice of the instruction set";
  m.attr("version") = SOFTMAX_EXT_VERSION;
  m.attr("built_torch") = SOFTMAX_EXT_BUILT_TORCH;
  m.attr("compiler") = SOFTMAX_EXT_COMPILER;
  m.def("compiled_isas", &compiled_isas, "Names of the instruction sets that were compiled, weakest first.");
  m.def("available_isas", &available_isas, "Those of them that this processor runs.");
  m.def("selected_isa", [] { return softmax_ext::kernels().isa; }, "The one in use.");
  m.def("select_isa", &select_isa, pybind11::arg("isa"), "Use this one from now on; ValueError if it cannot run here.");
  m.def("exp_nonpositive", &exp_nonpositive, pybind11::arg("x"),
        "exp of float32 values <= 0 as the kernels compute it; for the test of its error.");
}
