// What dropout multiplies an update with, on a CPU: genft_kernels/backends/eager/dropout.py compiles this file at its first
// use and calls it by ctypes.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "philox.h"

// A version for each kind of x86 CPU in one library, which thus may be kept where several machines read it.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define GENFT_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GENFT_INTO_EACH __attribute__((always_inline)) inline
#else
#define GENFT_FOR_EACH_CPU
#define GENFT_INTO_EACH inline
#endif

namespace {

constexpr int64_t kLanes = 64;  // elements that the compiler's vectors work on side by side

struct Dropout {
    uint64_t seed;
    genft::Stream stream;
    uint32_t threshold;  // floor(p * 2^32)
    int64_t in_features, out_features;
};

// Rows 4 * first to 4 * last: factors [4 * (last - first), in]. A number is its bits; those of zero are zero.
template <typename Bits>
GENFT_INTO_EACH void write_rows(const Dropout& dropout, Bits kept, int64_t first, int64_t last, Bits* factors) {
    for (int64_t block = first; block < last; ++block, factors += 4 * dropout.in_features) {
        for (int64_t start = 0; start < dropout.in_features; start += kLanes) {
            uint8_t keep[4][kLanes];
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const uint64_t counter = genft::block_counter(start + lane, 4 * block, dropout.out_features);
                const genft::Words words = genft::philox4x32(counter, dropout.stream, dropout.seed);
                for (int j = 0; j < 4; ++j) keep[j][lane] = words.word[j] >= dropout.threshold;
            }
            const int64_t count = std::min(kLanes, dropout.in_features - start);
            for (int j = 0; j < 4; ++j) {
                Bits* row = factors + j * dropout.in_features + start;
                for (int64_t lane = 0; lane < count; ++lane) row[lane] = keep[j][lane] ? kept : 0;
            }
        }
    }
}

GENFT_FOR_EACH_CPU
void write_rows_of(int bytes, const Dropout& dropout, uint64_t kept, int64_t first, int64_t last, void* factors) {
    switch (bytes) {
        case 2: return write_rows<uint16_t>(dropout, kept, first, last, static_cast<uint16_t*>(factors));
        case 4: return write_rows<uint32_t>(dropout, kept, first, last, static_cast<uint32_t*>(factors));
        case 8: return write_rows<uint64_t>(dropout, kept, first, last, static_cast<uint64_t*>(factors));
    }
}

}  // namespace

// Rows 4 * first to 4 * last of what an update [out, in] is multiplied with: numbers of `bytes` bytes, each `kept` (its
// bits) or 0.
extern "C" void genft_dropout_factors(uint64_t seed, uint32_t stream, uint32_t threshold, int64_t in_features,
                                      int64_t out_features, int64_t first, int64_t last, uint64_t kept, int bytes,
                                      uint8_t* factors, int threads) {
    const Dropout dropout{seed, static_cast<genft::Stream>(stream), threshold, in_features, out_features};
    const int64_t share = (last - first + threads - 1) / threads;
    std::vector<std::thread> others;
    for (int64_t begin = first + share; begin < last; begin += share) {
        others.emplace_back(write_rows_of, bytes, std::cref(dropout), kept, begin, std::min(begin + share, last),
                            factors + 4 * (begin - first) * in_features * bytes);
    }
    write_rows_of(bytes, dropout, kept, first, std::min(first + share, last), factors);
    for (std::thread& other : others) other.join();
}
