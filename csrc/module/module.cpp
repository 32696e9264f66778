// The Python module softmax_ext._C, for tests of the kernels: what no operator shows. It is built in the source folder
// alone and is in no wheel, since it serves one version of Python; the package does not import it. The kernels, and the
// choice of their instruction set, are in the CPU library, which this one calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../cpu_questions.h"

namespace {

std::vector<float> exp_nonpositive(const std::vector<float>& x) {
  std::vector<float> y(x.size());
  softmax_ext_cpu_exp_nonpositive(x.data(), y.data(), static_cast<int64_t>(x.size()));
  return y;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "for tests of softmax_ext's CPU kernels";
  m.def("exp_nonpositive", &exp_nonpositive, pybind11::arg("x"),
        "exp of float32 values <= 0 as the kernels in use compute it; for the test of its error.");
}
