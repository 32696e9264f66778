// What the fake CUDA headers beside this file need from the emulator (../emulator.cpp): the collectives of a thread,
// which switch to another fiber where a thread has to wait, and a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

// Where a thread is, for reports.
struct Where {
  const char* file;
  int line;
};

enum class Collective { kSyncWarp, kShuffle, kVote };
enum class Barrier { kSync, kOr, kAnd, kCount };

// Waits for all lanes of `mask`. A shuffle returns the value of lane `source` of the warp, a vote the lanes of `mask`
// whose value is not zero. A lane that exits or waits elsewhere is waited for in vain, and reported.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Where where);

// Waits for all threads of the block that have not exited; Barrier says what is made of their predicates.
int block_barrier(Barrier kind, int predicate, Where where);

void cluster_arrive(Where where);
void cluster_wait(Where where);
unsigned cluster_rank();
unsigned cluster_blocks();
// The same place in the shared memory of another block of the cluster.
void* map_shared_rank(const void* address, unsigned rank, Where where);

void* shared_memory();
int lane();

// Lets other threads run, now and then, if SOFTMAX_EXT_EMULATED_YIELD is set: for the accesses to memory.
extern bool yields;
void maybe_yield();

[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// A vector access at an address that is no multiple of its size is an error on the card, and here.
template <typename T>
void check_aligned(const T* address, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0)
    fail(where, "misaligned access of %zu bytes at %p", sizeof(T), static_cast<const void*>(address));
}

template <typename T>
T load(const T* address, Where where) {
  check_aligned(address, where);
  if (yields) maybe_yield();
  return *address;
}

template <typename T>
void store(T* address, const T& value, Where where) {
  check_aligned(address, where);
  if (yields) maybe_yield();
  *address = value;
}

// The bits of `from`, as the lowest of a larger type or as another type of the same size.
template <typename To, typename From>
To bits(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(to) < sizeof(from) ? sizeof(to) : sizeof(from));
  return to;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  return bits<T>(warp_collective(Collective::kShuffle, mask, bits<uint64_t>(value), source, where));
}

}  // namespace emulator
