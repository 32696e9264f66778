// Runs CUDA kernels on the CPU for the tests: one fiber for each thread, in an order drawn by a seeded generator.
//
//   - A fiber runs until it waits (barrier, warp collective, cluster barrier) or exits; then one that can run is drawn,
//     in half of the clusters from the same warp as long as that has any, so that warps run far ahead of each other.
//     Between two collectives no order of threads is certain, as on the card.
//   - Blocks of a cluster live at the same time; clusters run one after the other, in random order.
//   - Shared memory is a block's own, all NaN before the block begins; it cannot be touched beyond its end or, in a
//     cluster, while its block has not begun or after it has exited.
//   - When nothing can run and threads remain, it says what each of them waits for, and aborts.
//
// Environment:
//   SOFTMAX_EXT_EMULATED_SEED             of the generator; default 0
//   SOFTMAX_EXT_EMULATED_YIELD            set: accesses to memory by __ldcs, __stcs and the like switch too, now and then
//   SOFTMAX_EXT_EMULATED_CAPABILITY       "75", "80", "90" (default), ...
//   SOFTMAX_EXT_EMULATED_CODE             the capability that the kernels are compiled for; default: the same
//   SOFTMAX_EXT_EMULATED_MULTIPROCESSORS  default 4
#include <cxxabi.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN_ONLY(...) __VA_ARGS__
#else
#define ASAN_ONLY(...)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxCluster = 16;
constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 << 10;
constexpr size_t kMaxShared = 228 << 10;

// ---- stacks ----------------------------------------------------------------------------------------------------------

enum class State { kReady, kInWarp, kAtBarrier, kAtCluster, kExited };

struct Block;
struct Warp;

struct Fiber {
  void* registers[5];             // of __builtin_setjmp
  ucontext_t* context = nullptr;  // to enter it for the first time
  bool entered = false;
  // AddressSanitizer's.
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;

  // The thread that it is now.
  Block* block = nullptr;
  uint3 thread{};
  int lane = 0;
  Warp* warp = nullptr;

  State state = State::kExited;
  Where where{};
  // The collective or barrier that it waits in, and what that gives.
  Collective collective{};
  Barrier barrier{};
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0, result = 0;
  bool arrived = false;  // at the cluster's barrier
  uint64_t cluster_phase = 0;
};

// Goes on in `to`, until something goes on in `from`. (glibc's swapcontext would call the kernel twice for the mask of
// signals, and _longjmp makes AddressSanitizer clear the stack.)
__attribute__((noinline, no_sanitize_address)) void enter(Fiber* to) {
  if (to->entered) __builtin_longjmp(to->registers, 1);
  to->entered = true;
  setcontext(to->context);
  __builtin_unreachable();
}
__attribute__((noinline, no_sanitize_address)) void switch_registers(Fiber* from, Fiber* to) {
  if (__builtin_setjmp(from->registers) == 0) enter(to);
}

// ---- what runs -------------------------------------------------------------------------------------------------------

struct Warp {
  Fiber* lanes;
  unsigned waiting;  // lanes in a collective
  unsigned ready;    // lanes that can run
  size_t place;      // in ready_warps, if there are any
};

struct Block {
  uint3 index{};
  unsigned rank = 0;  // in the cluster
  Fiber* fibers = nullptr;
  unsigned live = 0, at_barrier = 0;
  bool begun = false;
  Warp warps[kMaxThreads / kWarp];
  char* memory = nullptr;  // kMaxShared bytes between two guard pages
  char* shared = nullptr;  // at their end
};

std::mutex one_launch;
Fiber* pool[kMaxCluster];  // kMaxThreads for each block of a cluster; kept for the next launch
Fiber host;                // the thread that launches
Fiber* current = nullptr;
Fiber* previous = nullptr;  // what was left by the last switch
std::vector<Warp*> ready_warps;
bool run_ahead = false;  // stay with a warp as long as it can run

const Kernel* kernel = nullptr;
size_t shared_bytes = 0;
unsigned block_threads = 0;
std::vector<Block> blocks;  // the first cluster_size are those of the cluster that runs
unsigned cluster_size = 0, cluster_live = 0, cluster_arrived = 0;
uint64_t cluster_phase = 0;

uint64_t seed = 0, random_state = 0, launches = 0;

// xorshift64*
uint64_t draw(uint64_t below) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1dull >> 32) * below >> 32;
}

template <typename T>
void shuffle_order(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[draw(i)]);
}

long environment(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtol(text, nullptr, 10) : otherwise;
}

// ---- reports ---------------------------------------------------------------------------------------------------------

std::string kernel_name() {
  Dl_info info{};
  std::string name;
  if (dladdr(kernel->function, &info) && info.dli_sname) {
    char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    name = readable ? readable : info.dli_sname;
    free(readable);
    return name;
  }
  // A kernel that is not exported: the types of its parameters, and its place in the library for addr2line.
  const char* parameters = strstr(kernel->signature, "Parameters = {");
  const char* end = parameters ? strchr(parameters, '}') : nullptr;
  name = "kernel(" + (end ? std::string(parameters + 14, end) : std::string("?")) + ")";
  char place[64];
  const auto offset = static_cast<const char*>(kernel->function) - static_cast<const char*>(info.dli_fbase);
  snprintf(place, sizeof place, " at +0x%lx", static_cast<unsigned long>(offset));
  return name + place;
}

unsigned linear(uint3 index) { return (index.z * blockDim.y + index.y) * blockDim.x + index.x; }

void print_launch() {
  fprintf(stderr, "  in %s, grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory", kernel_name().c_str(),
          gridDim.x, gridDim.y, gridDim.z, blockDim.x, blockDim.y, blockDim.z, shared_bytes);
  if (cluster_size > 1) fprintf(stderr, ", clusters of %u", cluster_size);
  fprintf(stderr, ", seed %llu\n", static_cast<unsigned long long>(seed));
}

std::string waits_for(const Fiber& fiber) {
  const char* what = "";
  char mask[32] = "";
  switch (fiber.state) {
    case State::kReady: return "can run";
    case State::kExited: return "exited";
    case State::kAtBarrier: what = "__syncthreads"; break;
    case State::kAtCluster: what = "the cluster's barrier"; break;
    case State::kInWarp:
      what = fiber.collective == Collective::kShuffle ? "a shuffle"
             : fiber.collective == Collective::kVote  ? "a vote"
                                                      : "__syncwarp";
      snprintf(mask, sizeof mask, " of lanes 0x%08x", fiber.mask);
  }
  return std::string("wait at ") + what + mask + ", " + fiber.where.file + ":" + std::to_string(fiber.where.line);
}

[[noreturn]] void report_deadlock() {
  fprintf(stderr, "emulator: deadlock\n");
  print_launch();
  for (unsigned b = 0; b < cluster_size; b++) {
    const Block& block = blocks[b];
    fprintf(stderr, "  block (%u, %u, %u)\n", block.index.x, block.index.y, block.index.z);
    for (unsigned begin = 0, end; begin < block_threads; begin = end) {
      const std::string what = waits_for(block.fibers[begin]);
      for (end = begin + 1; end < block_threads && waits_for(block.fibers[end]) == what; end++) continue;
      fprintf(stderr, "    threads %u to %u: %s\n", begin, end - 1, what.c_str());
    }
  }
  abort();
}

}  // namespace

bool yields = false;

void fail(Where where, const char* format, ...) {
  fprintf(stderr, "emulator: ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (where.file) fprintf(stderr, " (%s:%d)", where.file, where.line);
  if (current != &host && current)
    fprintf(stderr, "\n  thread %u of block (%u, %u, %u)", linear(threadIdx), blockIdx.x, blockIdx.y, blockIdx.z);
  fprintf(stderr, "\n");
  if (kernel) print_launch();
  abort();
}

namespace {

// ---- shared memory ---------------------------------------------------------------------------------------------------

void poison(const void* begin, const void* end, bool poisoned) {
  ASAN_ONLY(const size_t size = static_cast<const char*>(end) - static_cast<const char*>(begin);
            if (poisoned) __asan_poison_memory_region(begin, size); else __asan_unpoison_memory_region(begin, size);)
  (void)begin, (void)end, (void)poisoned;
}

void protect(const Block& block, int protection) {
  if (mprotect(block.memory, kMaxShared, protection) != 0) fail({}, "mprotect failed");
}

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail({}, "mmap of %zu bytes failed", bytes);
  return static_cast<char*>(memory);
}

// Opens the buffer to the block's threads, and to the cluster's.
void open_shared(Block& block) {
  block.begun = true;
  if (cluster_size > 1) protect(block, PROT_READ | PROT_WRITE);
  poison(block.shared, block.shared + shared_bytes, false);
  memset(block.shared, 0xff, shared_bytes);  // NaN in every floating-point type
}

void close_shared(Block& block) {
  poison(block.memory - kPage, block.memory + kMaxShared + kPage, true);
  if (cluster_size > 1) protect(block, PROT_NONE);
}

#ifndef __SANITIZE_ADDRESS__
struct sigaction old_segv;

// A word on faults at shared memory; then the fault again, for whoever handled it before.
void explain_fault(int, siginfo_t* info, void*) {
  const char* address = static_cast<const char*>(info->si_addr);
  for (const Block& block : blocks) {
    if (address < block.memory - kPage || address >= block.memory + kMaxShared + kPage) continue;
    const char* what = !block.begun      ? "which has not begun"
                       : block.live == 0 ? "which has exited"
                                         : "which is out of bounds";
    fprintf(stderr, "emulator: access to byte %ld of the shared memory of block (%u, %u, %u), %s\n",
            static_cast<long>(address - block.shared), block.index.x, block.index.y, block.index.z, what);
    fprintf(stderr, "  by thread %u of block (%u, %u, %u)\n", linear(threadIdx), blockIdx.x, blockIdx.y, blockIdx.z);
    if (kernel) print_launch();
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
}

void install_fault_handler() {
  struct sigaction action{};
  action.sa_sigaction = explain_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
}
#else
void install_fault_handler() {}
#endif

// ---- switching -------------------------------------------------------------------------------------------------------

// After each switch, on the new stack.
void finish_switch() {
  ASAN_ONLY(const void* stack; size_t size; __sanitizer_finish_switch_fiber(current->fake_stack, &stack, &size);
            previous->stack = stack; previous->stack_size = size;)
  if (current->block) {
    threadIdx = current->thread;
    blockIdx = current->block->index;
  }
}

void switch_to(Fiber* to) {
  if (to == current) return;
  Fiber* from = current;
  previous = from;
  current = to;
  ASAN_ONLY(__sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_size);)
  switch_registers(from, to);
  finish_switch();
}

void make_ready(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  fiber->state = State::kReady;
  if (warp.ready == 0) {
    warp.place = ready_warps.size();
    ready_warps.push_back(&warp);
  }
  warp.ready |= 1u << fiber->lane;
}

// Goes on with a fiber that can run, or with the host where none can.
void run_another() {
  if (ready_warps.empty()) return switch_to(&host);
  const bool stay = run_ahead && current != &host && current->warp->ready != 0;
  Warp& warp = stay ? *current->warp : *ready_warps[draw(ready_warps.size())];
  // The first ready lane from a random one on.
  const unsigned from = static_cast<unsigned>(draw(kWarp));
  const unsigned later = warp.ready >> from << from;
  const int lane = __builtin_ctz(later != 0 ? later : warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) {
    ready_warps[warp.place] = ready_warps.back();
    ready_warps[warp.place]->place = warp.place;
    ready_warps.pop_back();
  }
  switch_to(&warp.lanes[lane]);
}

void release_barrier(Block& block) {
  int count = 0;
  for (unsigned i = 0; i < block_threads; i++)
    if (block.fibers[i].state == State::kAtBarrier) count += block.fibers[i].value != 0;
  for (unsigned i = 0; i < block_threads; i++) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    const bool all = count == static_cast<int>(block.at_barrier);
    fiber.result = fiber.barrier == Barrier::kCount ? count : fiber.barrier == Barrier::kAnd ? all : count > 0;
    make_ready(&fiber);
  }
  block.at_barrier = 0;
}

void release_cluster() {
  cluster_arrived = 0;
  cluster_phase++;
  for (unsigned b = 0; b < cluster_size; b++)
    for (unsigned i = 0; i < block_threads; i++)
      if (blocks[b].fibers[i].state == State::kAtCluster) make_ready(&blocks[b].fibers[i]);
}

// Nothing waits for a thread that has exited, except a collective of its warp that names it.
void exit_thread() {
  Fiber& self = *current;
  Block& block = *self.block;
  if (self.arrived && self.cluster_phase == cluster_phase) cluster_arrived--;
  self.state = State::kExited;
  block.live--;
  cluster_live--;
  if (block.live == 0) close_shared(block);
  if (block.live > 0 && block.at_barrier == block.live) release_barrier(block);
  if (cluster_live > 0 && cluster_arrived == cluster_live) release_cluster();
  run_another();
}

// A fiber is one thread after the other.
void fiber_main() {
  for (finish_switch();;) {
    if (!current->block->begun) open_shared(*current->block);
    kernel->call(kernel->arguments);
    exit_thread();
  }
}

void make_fiber(Fiber& fiber, char* stack, size_t size) {
  if (mprotect(stack, size, PROT_READ | PROT_WRITE) != 0) fail({}, "mprotect of a stack failed");
  fiber.stack = stack;
  fiber.stack_size = size;
  fiber.context = new ucontext_t;
  getcontext(fiber.context);
  fiber.context->uc_stack.ss_sp = stack;
  fiber.context->uc_stack.ss_size = size;
  fiber.context->uc_link = nullptr;
  makecontext(fiber.context, fiber_main, 0);
}

// Fibers and shared memory for the blocks of a cluster.
void grow() {
  for (unsigned b = static_cast<unsigned>(blocks.size()); b < cluster_size; b++) {
    pool[b] = new Fiber[kMaxThreads];
    char* stacks = map(kMaxThreads * kStack);
    // Each above a guard page.
    // Their upper ends lie at different distances from a page's, or they would share few of the caches' lines.
    for (unsigned i = 0; i < kMaxThreads; i++)
      make_fiber(pool[b][i], stacks + i * kStack + kPage, kStack - kPage - i * 5 % 64 * 64);
    blocks.emplace_back();
    blocks[b].memory = map(kMaxShared + 2 * kPage) + kPage;
  }
}

void run_cluster(dim3 cluster, uint64_t first) {
  // The first block of the cluster, in units of clusters.
  const unsigned across = gridDim.x / cluster.x, down = gridDim.y / cluster.y;
  const uint3 origin{static_cast<unsigned>(first % across) * cluster.x,
                     static_cast<unsigned>(first / across % down) * cluster.y,
                     static_cast<unsigned>(first / across / down) * cluster.z};
  run_ahead = draw(2) != 0;
  cluster_live = cluster_size * block_threads;
  cluster_arrived = 0;
  ready_warps.clear();
  for (unsigned b = 0; b < cluster_size; b++) {
    Block& block = blocks[b];
    block.index = {origin.x + b % cluster.x, origin.y + b / cluster.x % cluster.y,
                   origin.z + b / cluster.x / cluster.y};
    block.rank = b;
    block.fibers = pool[b];
    block.live = block_threads;
    block.at_barrier = 0;
    block.begun = false;
    for (unsigned w = 0; w * kWarp < block_threads; w++) block.warps[w] = {block.fibers + w * kWarp, 0, 0, 0};
    for (unsigned i = 0; i < block_threads; i++) {
      Fiber& fiber = block.fibers[i];
      fiber.block = &block;
      fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      fiber.lane = i % kWarp;
      fiber.warp = &block.warps[i / kWarp];
      fiber.arrived = false;
      make_ready(&fiber);
    }
  }
  run_another();
  if (cluster_live > 0) report_deadlock();
}

}  // namespace

// ---- what threads call -----------------------------------------------------------------------------------------------

int lane() { return current->lane; }
void* shared_memory() { return current->block->shared; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_blocks() { return cluster_size; }

void maybe_yield() {
  if (draw(16) != 0) return;
  make_ready(current);
  run_another();
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Where where) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  if (!(mask >> self.lane & 1)) fail(where, "lane %d is not in the mask 0x%08x that it names", self.lane, mask);
  self.collective = kind;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.where = where;
  self.state = State::kInWarp;
  warp.waiting |= 1u << self.lane;

  // A lane of `mask` that waits for other lanes or in another collective has yet to come.
  bool complete = (warp.waiting & mask) == mask;
  for (unsigned rest = mask; complete && rest != 0; rest &= rest - 1) {
    const Fiber& other = warp.lanes[__builtin_ctz(rest)];
    complete = other.mask == mask && other.collective == kind;
  }
  if (!complete) {
    run_another();
    return self.result;
  }

  uint64_t votes = 0;
  if (kind == Collective::kVote)
    for (unsigned rest = mask; rest != 0; rest &= rest - 1)
      if (warp.lanes[__builtin_ctz(rest)].value != 0) votes |= rest & -rest;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    Fiber& other = warp.lanes[__builtin_ctz(rest)];
    other.result = votes;
    if (kind == Collective::kShuffle) {
      if (!(mask >> other.source & 1)) fail(other.where, "a shuffle of lanes 0x%08x reads lane %d", mask, other.source);
      other.result = warp.lanes[other.source].value;
    }
    if (&other != &self) make_ready(&other);
  }
  self.state = State::kReady;
  warp.waiting &= ~mask;
  return self.result;
}

int block_barrier(Barrier kind, int predicate, Where where) {
  Fiber& self = *current;
  Block& block = *self.block;
  self.barrier = kind;
  self.value = predicate != 0;
  self.where = where;
  self.state = State::kAtBarrier;
  block.at_barrier++;
  if (block.at_barrier == block.live) release_barrier(block);
  run_another();
  return static_cast<int>(self.result);
}

void cluster_arrive(Where where) {
  Fiber& self = *current;
  if (self.arrived) fail(where, "arrives at the cluster's barrier twice");
  self.arrived = true;
  self.cluster_phase = cluster_phase;
  if (++cluster_arrived == cluster_live) release_cluster();
}

void cluster_wait(Where where) {
  Fiber& self = *current;
  if (!self.arrived) fail(where, "waits at the cluster's barrier without having arrived");
  self.where = where;
  if (self.cluster_phase == cluster_phase)
    self.state = State::kAtCluster;
  else
    make_ready(&self);
  run_another();
  self.arrived = false;
}

void* map_shared_rank(const void* address, unsigned rank, Where where) {
  const Block& own = *current->block;
  const auto offset = static_cast<const char*>(address) - own.shared;
  if (rank >= cluster_size) fail(where, "block %u of a cluster of %u", rank, cluster_size);
  if (offset < 0 || offset > static_cast<ptrdiff_t>(shared_bytes)) fail(where, "no address in the own shared memory");
  const Block& other = blocks[rank];
  if (other.live == 0) fail(where, "block %u of the cluster has exited", rank);
  return other.shared + offset;
}

// ---- the host's side -------------------------------------------------------------------------------------------------

namespace {

cudaError_t last_error = cudaSuccess;

struct Limits {
  size_t shared = 48 << 10;
  bool large_clusters = false;
};
std::map<const void*, Limits> limits;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int capability() { return static_cast<int>(environment("SOFTMAX_EXT_EMULATED_CAPABILITY", 90)); }
int multiprocessors() { return static_cast<int>(environment("SOFTMAX_EXT_EMULATED_MULTIPROCESSORS", 4)); }

// The table "Technical Specifications per Compute Capability" of the programming guide.
size_t shared_per_multiprocessor() {
  switch (capability()) {
    case 75: return 64 << 10;
    case 80: return 164 << 10;
    case 86:
    case 89:
    case 120: return 100 << 10;
    default: return 228 << 10;
  }
}
size_t max_shared() { return capability() == 75 ? 64 << 10 : shared_per_multiprocessor() - (1 << 10); }
int max_resident_threads() {
  switch (capability()) {
    case 75: return 1024;
    case 86:
    case 89:
    case 120: return 1536;
    default: return 2048;
  }
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const auto& value = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return {value.x, value.y, value.z};
  }
  return {};
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* function) {
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = cluster_of(config);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  const Limits limit = limits.count(function) ? limits[function] : Limits{};
  if (config.dynamicSmemBytes > std::min(limit.shared, max_shared())) return cudaErrorInvalidValue;
  const uint64_t size = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (size == 1) return cudaSuccess;
  if (capability() < 90) return cudaErrorNotSupported;
  if (size == 0 || size > (limit.large_clusters ? kMaxCluster : 8)) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& launched) {
  const std::lock_guard<std::mutex> guard(one_launch);
  if (current && current != &host) fail({}, "a launch from a kernel");
  const cudaError_t error = check(config, launched.function);
  if (error != cudaSuccess) return result(error);

  const dim3 cluster = cluster_of(config);
  current = &host;
  host.entered = true;
  kernel = &launched;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block_threads = blockDim.x * blockDim.y * blockDim.z;
  shared_bytes = config.dynamicSmemBytes;
  cluster_size = cluster.x * cluster.y * cluster.z;
  seed = static_cast<uint64_t>(environment("SOFTMAX_EXT_EMULATED_SEED", 0));
  yields = getenv("SOFTMAX_EXT_EMULATED_YIELD") != nullptr;
  random_state = (seed + 1) * 0x9e3779b97f4a7c15ull + ++launches * 0xbf58476d1ce4e5b9ull;
  if (random_state == 0) random_state = 1;
  if (launches == 1) install_fault_handler();

  grow();
  for (unsigned b = 0; b < cluster_size; b++) {
    Block& block = blocks[b];
    block.shared = block.memory + kMaxShared - (shared_bytes + 15) / 16 * 16;
    protect(block, cluster_size > 1 ? PROT_NONE : PROT_READ | PROT_WRITE);
    poison(block.memory - kPage, block.memory + kMaxShared + kPage, true);
  }

  const uint64_t clusters = uint64_t{gridDim.x} * gridDim.y * gridDim.z / cluster_size;
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; i++) order[i] = i;
  shuffle_order(order);
  for (const uint64_t i : order) run_cluster(cluster, i);
  kernel = nullptr;
  return cudaSuccess;
}

}  // namespace emulator

// Launches so far, for tests that count them.
extern "C" __attribute__((visibility("default"))) uint64_t emulator_launches() { return emulator::launches; }

using emulator::result;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "unknown error";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
  }
  return "unknown error";
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using namespace emulator;
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreads; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; return cudaSuccess;
    case cudaDevAttrClockRate: *value = 1000000; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = max_resident_threads(); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(shared_per_multiprocessor());
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(max_shared()); return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = capability() == 75 ? 0 : 1 << 10; return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = capability() >= 90; return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  snprintf(properties->name, sizeof properties->name, "emulated");
  return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return result(*memory ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
  *free_bytes = *all_bytes = size_t{1} << 30;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st{};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

struct CUgraph_st {
  uint64_t launches;
};
namespace {
uint64_t captured_from = 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  captured_from = emulator::launches;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = new CUgraph_st{emulator::launches - captured_from};
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph->launches;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace emulator;
  const std::lock_guard<std::mutex> guard(one_launch);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || static_cast<size_t>(value) > max_shared()) return result(cudaErrorInvalidValue);
      limits[kernel].shared = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (capability() < 90) return result(cudaErrorNotSupported);
      limits[kernel].large_clusters = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  using namespace emulator;
  attributes->binaryVersion = capability();
  attributes->ptxVersion = static_cast<int>(environment("SOFTMAX_EXT_EMULATED_CODE", capability()));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared_bytes) {
  using namespace emulator;
  const size_t reserved = capability() == 75 ? 0 : 1 << 10;
  const size_t by_shared = shared_per_multiprocessor() / std::max<size_t>(shared_bytes + reserved, 1);
  *blocks = static_cast<int>(std::min({by_shared, static_cast<size_t>(max_resident_threads() / threads), size_t{16}}));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  using namespace emulator;
  const cudaError_t error = check(*config, kernel);
  if (error != cudaSuccess) return result(error);
  const dim3 block = config->blockDim, cluster = cluster_of(*config);
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(block.x * block.y * block.z),
                                                config->dynamicSmemBytes);
  *clusters = blocks * multiprocessors() / static_cast<int>(cluster.x * cluster.y * cluster.z);
  return cudaSuccess;
}
