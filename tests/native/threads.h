// How many threads the calls of this thread are split among.
#pragma once

namespace softmax_ext::native {

extern thread_local int threads_of_caller;

}  // namespace softmax_ext::native
