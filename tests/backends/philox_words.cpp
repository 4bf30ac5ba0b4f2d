// Usage: philox_words IN OUT STREAM SEED THRESHOLD; prints, for each element (i, j), its word and whether it is kept.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "philox.h"

int main(int argc, char** argv) {
    if (argc != 6) return 2;
    const uint64_t in = std::strtoull(argv[1], nullptr, 0), out = std::strtoull(argv[2], nullptr, 0);
    const auto stream = static_cast<genft::Stream>(std::strtoul(argv[3], nullptr, 0));
    const uint64_t seed = std::strtoull(argv[4], nullptr, 0);
    const auto threshold = static_cast<uint32_t>(std::strtoull(argv[5], nullptr, 0));
    for (uint64_t i = 0; i < in; ++i) {
        for (uint64_t j = 0; j < out; ++j) {
            const uint32_t word = genft::philox4x32(genft::block_counter(i, j, out), stream, seed).word[j % 4];
            std::printf("%" PRIu32 " %d\n", word, word >= threshold);
        }
    }
}
