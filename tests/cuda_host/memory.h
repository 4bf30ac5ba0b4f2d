// What a kernel may touch: the global buffers of the call, registered beforehand, and its own shared memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace cuda_host {

constexpr unsigned char kPoison = 0xFF;  // NaN in every float format
constexpr unsigned char kFence = 0xA5;

struct Range {
    uintptr_t begin, end;
    bool contains(uintptr_t address, size_t bytes) const { return begin <= address && address + bytes <= end; }
};

// The tensors of the calls since the last forget_buffers.
inline std::vector<Range> buffers;

inline bool is_in_a_buffer(const void* pointer, size_t bytes) {
    static size_t last = 0;  // an access is likely where the one before was
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (last < buffers.size() && buffers[last].contains(address, bytes)) return true;
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (buffers[i].contains(address, bytes)) {
            last = i;
            return true;
        }
    }
    return false;
}

// A block's dynamic shared memory, between two fences.
class SharedMemory {
  public:
    void resize(size_t bytes) {
        size_ = bytes;
        memory_.assign(bytes + 2 * kFenceBytes + kAlignment, kFence);
        const auto address = reinterpret_cast<uintptr_t>(memory_.data()) + kFenceBytes;
        begin_ = reinterpret_cast<unsigned char*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }
    void poison() { std::memset(begin_, kPoison, size_); }
    void* begin() { return begin_; }
    bool contains(const void* pointer, size_t bytes) const {
        const auto* address = static_cast<const unsigned char*>(pointer);
        return begin_ <= address && address + bytes <= begin_ + size_;
    }
    bool fences_stand() const {
        for (size_t i = 0; i < kFenceBytes; ++i) {
            if (begin_[size_ + i] != kFence || *(begin_ - 1 - i) != kFence) return false;
        }
        return true;
    }

  private:
    static constexpr size_t kFenceBytes = 4096, kAlignment = 1024;
    std::vector<unsigned char> memory_;
    unsigned char* begin_ = nullptr;
    size_t size_ = 0;
};

}  // namespace cuda_host
