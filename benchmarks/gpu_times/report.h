// The table that is printed, and the same as CSV.
#pragma once

#include <cstdio>
#include <stdexcept>

#include "cases.h"

namespace gpu_times {

// The card, and what ran on it.
struct Machine {
  std::string card, driver, cuda, clock, commit;
};

struct Result {
  double ms = 0;
  int launches = 0;
  double loss_error = 0, gradient_error = 0;  // the largest; NaN counts as the largest
  bool right = true;
};

class Report {
 public:
  Report(const Machine& machine, const std::string& csv) : machine_(machine) {
    if (!csv.empty() && !(file_ = std::fopen(csv.c_str(), "w"))) throw std::runtime_error("can't write " + csv);
    std::printf("%s, driver %s, CUDA %s, %s, commit %s\n\n", machine.card.c_str(), machine.driver.c_str(),
                machine.cuda.c_str(), machine.clock.c_str(), machine.commit.c_str());
    std::printf("%-20s %-25s %9s %10s %7s %6s %8s %8s %8s\n", "case", "pass", "ms", "MB", "GB/s", "copy", "launches",
                "loss", "gradient");
    if (file_)
      std::fprintf(file_,
                   "card,driver,cuda,clock,commit,case,pass,ms,bytes,gb_per_s,percent_of_copy,launches,"
                   "loss_error,gradient_error,right\n");
  }
  ~Report() {
    if (file_) std::fclose(file_);
  }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  // The copy of a case comes first.
  void add(const Case& one, const Pass& pass, const Result& result) {
    const double bytes = static_cast<double>(bytes_moved(one, pass)), speed = bytes / result.ms / 1e6;
    if (pass.kind == Kind::kCopy) copy_speed_ = speed;
    const double percent = 100 * speed / copy_speed_;
    const std::string name = one.name(), pass_name = pass.name();
    std::printf("%-20s %-25s %9.4f %10.1f %7.0f %5.0f%% %8d %8.1e %8.1e%s\n", name.c_str(), pass_name.c_str(),
                result.ms, bytes / 1e6, speed, percent, result.launches, result.loss_error, result.gradient_error,
                result.right ? "" : "  WRONG");
    std::fflush(stdout);
    rows_++;
    wrong_ += !result.right;
    if (!file_) return;
    for (const std::string& text :
         {machine_.card, machine_.driver, machine_.cuda, machine_.clock, machine_.commit, name, pass_name})
      std::fprintf(file_, "\"%s\",", text.c_str());
    std::fprintf(file_, "%.6f,%.0f,%.1f,%.1f,%d,%.3g,%.3g,%d\n", result.ms, bytes, speed, percent, result.launches,
                 result.loss_error, result.gradient_error, result.right);
    std::fflush(file_);
  }

  int rows() const { return rows_; }
  int wrong() const { return wrong_; }

 private:
  Machine machine_;
  std::FILE* file_ = nullptr;
  double copy_speed_ = 0;
  int rows_ = 0, wrong_ = 0;
};

}  // namespace gpu_times
