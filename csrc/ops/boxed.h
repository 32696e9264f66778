// Operators as torch calls them: their arguments lie on a stack, and their results go there. This does what TORCH_BOX does,
// but gathers the options of cross entropy, which are single arguments, in one parameter of the function.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "../params.h"

namespace softmax_ext {

// The next argument of type T. `take` moves a tensor's handle off the stack, so each is taken once.
template <typename T>
struct Argument {
  static constexpr uint64_t kCount = 1;  // of arguments on the stack
  static T take(StableIValue*& next) { return torch::stable::detail::to<T>(*next++); }
};

template <>
struct Argument<Options> {
  static constexpr uint64_t kCount = 9;
  static Options take(StableIValue*& next) {
    const auto whole = [&] { return Argument<int64_t>::take(next); };
    const auto real = [&] { return Argument<double>::take(next); };
    const auto real_or_zero = [&] { return Argument<std::optional<double>>::take(next).value_or(0); };
    const auto truth = [&] { return Argument<bool>::take(next); };
    // dim, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, weighs_by_probability, skips_ignored:
    // braces are evaluated in order.
    return {whole(), whole(), whole(), real(), real(), real_or_zero(), real(), truth(), truth()};
  }
};

template <typename Result>
struct Results {
  static constexpr uint64_t kCount = 1;
  static void put(StableIValue* stack, Result result) { stack[0] = torch::stable::detail::from<Result>(result); }
};

template <typename... Each>
struct Results<std::tuple<Each...>> {
  static constexpr uint64_t kCount = sizeof...(Each);
  static void put(StableIValue* stack, std::tuple<Each...> results) {
    torch::stable::detail::box_from_tuple<Each...>(stack, std::move(results));
  }
};

template <>
struct Results<void> {
  static constexpr uint64_t kCount = 0;
};

template <auto function>
struct Boxed;

template <typename Result, typename... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr uint64_t kArguments = (Argument<Parameters>::kCount + ... + 0), kResults = Results<Result>::kCount;
    STD_TORCH_CHECK(arguments == kArguments && results == kResults, "softmax_ext: the schema has ", arguments,
                    " arguments and ", results, " results, the function ", kArguments, " and ", kResults, ".");
    StableIValue* next = stack;
    std::tuple<Parameters...> taken{Argument<Parameters>::take(next)...};  // braces: in order
    if constexpr (kResults == 0)
      std::apply(function, std::move(taken));
    else
      Results<Result>::put(stack, std::apply(function, std::move(taken)));
  }
};

}  // namespace softmax_ext
