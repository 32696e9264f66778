// The allocation of results on the CPU: large ones from a cache (block_cache.h).
#include <algorithm>
#include <memory>

#include "../tensors.h"
#include "block_cache.h"

// Since torch 2.11; null in older ones.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* block), void* block);

namespace softmax_ext {
namespace {

// Up to here glibc's malloc keeps what is freed itself (DEFAULT_MMAP_THRESHOLD_MAX).
constexpr int64_t kLarge = 32 << 20;

void release(void*, void* block) {
  const std::unique_ptr<MemoryBlock> owned(static_cast<MemoryBlock*>(block));
  release_block(*owned);
}

}  // namespace

Tensor device::empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                             const Tensor& like) {
  const int64_t bytes = product(sizes) * size_of(type);
  if (bytes <= kLarge || !torch_from_blob) return torch_empty_strided(sizes, strides, type, like);
  auto block = std::make_unique<MemoryBlock>(acquire_block(static_cast<size_t>(bytes)));
  if (!block->address) return torch_empty_strided(sizes, strides, type, like);
  void* const address = block->address;
  AtenTensorHandle handle;  // whose deleter has the block from here on
  const AOTITorchError error = torch_from_blob(
      address, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0, release, block.release());
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace softmax_ext
