// Philox4x32-10 and the counters of GenFT's updates, for host and device code alike (docs/method.md#random-numbers).
//
// Element (i of in, j of out) of an update reads word j % 4 of the block with counter (q low, q high, stream, 0),
// q = i * ceil(out / 4) + j / 4, and the 64-bit seed as key. genft_kernels/philox.py computes the same words.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GENFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GENFT_HOST_DEVICE inline
#endif

namespace genft {

enum Stream : uint32_t { kColumnStream = 0, kRowStream = 1, kRoundingStream = 2 };

struct Words {
    uint32_t word[4];
};

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

GENFT_HOST_DEVICE Words philox4x32(uint64_t counter, uint32_t stream, uint64_t seed) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0;
        const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c1 = static_cast<uint32_t>(product1);
        c3 = static_cast<uint32_t>(product0);
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// The counter of the block that holds element (i of in, j of out).
GENFT_HOST_DEVICE uint64_t block_counter(uint64_t i, uint64_t j, uint64_t out_features) {
    return i * ((out_features + 3) / 4) + j / 4;
}

}  // namespace genft
