// What the harness does on the device besides the project's kernels: memory, drawn inputs, poison, times.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"

namespace gpu_times {

#define GPU_TIMES_CHECK(call) ::gpu_times::check(call, #call)

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which) {
  int value = 0;
  GPU_TIMES_CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

// ---- memory ----------------------------------------------------------------------------------------------------------

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) { GPU_TIMES_CHECK(cudaMalloc(&data_, static_cast<size_t>(bytes))); }
  Memory(Memory&& other) : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }  // an error has been seen by the call that made it

  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // All bits one: NaN in every floating-point type.
  void poison(cudaStream_t stream) const {
    GPU_TIMES_CHECK(cudaMemsetAsync(data_, 0xff, static_cast<size_t>(bytes_), stream));
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

template <typename T>
Memory on_device(const std::vector<T>& values, cudaStream_t stream) {
  Memory memory(static_cast<int64_t>(values.size() * sizeof(T)));
  GPU_TIMES_CHECK(
      cudaMemcpyAsync(memory.as<T>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
  GPU_TIMES_CHECK(cudaStreamSynchronize(stream));
  return memory;
}

template <typename T>
std::vector<T> on_host(const Memory& memory, int64_t count, cudaStream_t stream) {
  std::vector<T> values(static_cast<size_t>(count));
  GPU_TIMES_CHECK(
      cudaMemcpyAsync(values.data(), memory.as<T>(), values.size() * sizeof(T), cudaMemcpyDeviceToHost, stream));
  GPU_TIMES_CHECK(cudaStreamSynchronize(stream));
  return values;
}

// One row of a tensor of the logits' shape.
inline std::vector<double> row_on_host(const Memory& memory, const Case& one, int64_t row, cudaStream_t stream) {
  const int64_t size = softmax_ext::size_of(one.type), run = one.inner == 1 ? one.classes : 1;
  const int64_t first = row / one.inner * one.classes * one.inner + row % one.inner;
  std::vector<char> bytes(static_cast<size_t>(one.classes * size));
  for (int64_t c = 0; c < one.classes; c += run)
    GPU_TIMES_CHECK(cudaMemcpyAsync(bytes.data() + c * size, memory.as<char>() + (first + c * one.inner) * size,
                                    static_cast<size_t>(run * size), cudaMemcpyDeviceToHost, stream));
  GPU_TIMES_CHECK(cudaStreamSynchronize(stream));
  std::vector<double> values(static_cast<size_t>(one.classes));
  for (size_t c = 0; c < values.size(); c++) {
    uint32_t bits = 0;  // of a float; a bfloat16 is its upper half
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, bytes.data() + static_cast<int64_t>(c) * size,
                static_cast<size_t>(size));
    float value;
    std::memcpy(&value, &bits, 4);
    values[c] = value;
  }
  return values;
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t elements, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>((elements + kThreads - 1) / kThreads, 4096)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  GPU_TIMES_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

__device__ inline void store(float value, float* to) { *to = value; }
__device__ inline void store(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }
__device__ inline bool is_nan(float value) { return value != value; }
__device__ inline bool is_nan(__nv_bfloat16 value) { return is_nan(__bfloat162float(value)); }

// Nearly normal, of standard deviation 2: a sum of four uniform numbers made of one hash of the place.
template <typename E>
__global__ void draw(E* to, int64_t n, int seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    uint64_t hash = (static_cast<uint64_t>(i) + (static_cast<uint64_t>(seed + 1) << 40)) * 0x9e3779b97f4a7c15ull;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9ull;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111ebull;
    hash ^= hash >> 31;
    float sum = 0;
    for (int part = 0; part < 64; part += 16) sum += static_cast<float>(hash >> part & 0xffff) / 65536.0f;
    store((sum - 2) * 3.4641016f, to + i);
  }
}

template <typename E>
__global__ void count_nans(const E* values, int64_t n, unsigned long long* count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned long long own = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    own += is_nan(values[i]);
  if (own) atomicAdd(count, own);
}

// Calls the function with a pointer of the elements' type.
template <typename Function>
void with_elements(const Memory& memory, DType type, const Function& function) {
  if (type == DType::kFloat32)
    function(memory.as<float>());
  else
    function(memory.as<__nv_bfloat16>());
}

inline int64_t nans_in(const Memory& memory, DType type, int64_t n, cudaStream_t stream) {
  const Memory count = on_device<unsigned long long>({0}, stream);
  with_elements(memory, type, [&](auto* values) {
    launch(count_nans<std::remove_pointer_t<decltype(values)>>, n, stream, values, n, count.as<unsigned long long>());
  });
  return static_cast<int64_t>(on_host<unsigned long long>(count, 1, stream)[0]);
}

// ---- times -----------------------------------------------------------------------------------------------------------

class Event {
 public:
  Event() { GPU_TIMES_CHECK(cudaEventCreate(&event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record(cudaStream_t stream) const { GPU_TIMES_CHECK(cudaEventRecord(event_, stream)); }
  double since(const Event& begin) const {
    float ms = 0;
    GPU_TIMES_CHECK(cudaEventElapsedTime(&ms, begin.event_, event_));
    return ms;
  }

 private:
  cudaEvent_t event_;
};

// The median time of call(0), call(1), ..., each between two events. `hold` queues work that the device does while the
// host queues the calls, so that no call waits for the host.
template <typename Call, typename Hold>
double median_ms(const Call& call, int turns, const Hold& hold, cudaStream_t stream) {
  const std::vector<Event> begin(static_cast<size_t>(turns)), end(static_cast<size_t>(turns));
  hold();
  for (int turn = 0; turn < turns; turn++) {
    begin[static_cast<size_t>(turn)].record(stream);
    call(turn);
    end[static_cast<size_t>(turn)].record(stream);
  }
  GPU_TIMES_CHECK(cudaStreamSynchronize(stream));
  std::vector<double> times;
  for (size_t turn = 0; turn < begin.size(); turn++) times.push_back(end[turn].since(begin[turn]));
  std::nth_element(times.begin(), times.begin() + turns / 2, times.end());
  return times[static_cast<size_t>(turns / 2)];
}

// How many kernels a call launches: the nodes of its graph.
template <typename Call>
int count_launches(const Call& call, cudaStream_t stream) {
  GPU_TIMES_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  call();
  cudaGraph_t graph;
  size_t nodes = 0;
  GPU_TIMES_CHECK(cudaStreamEndCapture(stream, &graph));
  GPU_TIMES_CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
  GPU_TIMES_CHECK(cudaGraphDestroy(graph));
  return static_cast<int>(nodes);
}

}  // namespace gpu_times
