// Products of thin matrices with a block of numbers that stays in the first cache: kBlockRows rows of a strip of kLanes
// columns. Vectors are as long as the CPU's.
#pragma once

#include <cstdint>

#include "cpu_math.h"

namespace genft::cpu {

constexpr int64_t kLanes = 64;     // columns of a strip
constexpr int64_t kBlockRows = 8;  // a multiple of the 4 of one Philox block

template <class Wide>
struct alignas(64) Block {
    Wide number[kBlockRows][kLanes];

    GENFT_INTO_EACH Wide* operator[](int64_t row) { return number[row]; }
    GENFT_INTO_EACH const Wide* operator[](int64_t row) const { return number[row]; }
};

template <class Wide>
GENFT_INTO_EACH void multiply(Block<Wide>& block, const Block<Wide>& other) {
    for (int64_t i = 0; i < kBlockRows * kLanes; ++i) block[0][i] *= other[0][i];
}

// Zeros in the lanes from `count` on: there infinities times nothing are none.
template <class Wide>
GENFT_INTO_EACH void clear_from(Block<Wide>& block, int64_t count) {
    for (int64_t i = 0; count < kLanes && i < kBlockRows; ++i) {
        for (int64_t lane = count; lane < kLanes; ++lane) block[i][lane] = 0;
    }
}

template <class Wide, int kBytes>
struct ThinProducts {
    typedef Wide Vector __attribute__((vector_size(kBytes), aligned(alignof(Wide)), may_alias));
    static constexpr int kWidth = kBytes / int(sizeof(Wide)), kVectors = int(kLanes) / kWidth;
    // Vectors side by side, and rows of sums, that registers hold at once: AVX-512 has 32 of them, the others 16.
    static constexpr int kSide = kBytes == 64 ? 2 : 1, kSumRows = kBytes == 64 ? 4 : 2, kSumUnits = 4;

    GENFT_INTO_EACH static const Vector& at(const Wide* from, int vector) {
        return reinterpret_cast<const Vector*>(from)[vector];
    }
    GENFT_INTO_EACH static Vector& at(Wide* from, int vector) { return reinterpret_cast<Vector*>(from)[vector]; }

    // block = left right, of left [k, kBlockRows] (transposed) and right [k, kLanes].
    GENFT_INTO_EACH static void product(const Wide* left, const Wide* right, int64_t k, Block<Wide>& block) {
        for (int first = 0; first < kVectors; first += kSide) {
            Vector sum[kBlockRows][kSide] = {};
            for (int64_t j = 0; j < k; ++j) {
                Vector side[kSide];
                for (int s = 0; s < kSide; ++s) side[s] = at(right + j * kLanes, first + s);
#pragma GCC unroll 8
                for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
                    for (int s = 0; s < kSide; ++s) sum[i][s] += left[j * kBlockRows + i] * side[s];
                }
            }
            for (int i = 0; i < kBlockRows; ++i) {
                for (int s = 0; s < kSide; ++s) at(block[i], first + s) = sum[i][s];
            }
        }
    }

    // sums [k, kLanes] += left^T block, of left [k, kBlockRows].
    GENFT_INTO_EACH static void sum_rows(const Block<Wide>& block, const Wide* left, int64_t k, Wide* sums) {
        for (int first = 0; first < kVectors; first += kSide) {
            Vector number[kBlockRows][kSide];
            for (int i = 0; i < kBlockRows; ++i) {
                for (int s = 0; s < kSide; ++s) number[i][s] = at(block[i], first + s);
            }
            for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 2
                for (int s = 0; s < kSide; ++s) {
                    Vector sum = at(sums + j * kLanes, first + s);
#pragma GCC unroll 8
                    for (int i = 0; i < kBlockRows; ++i) sum += left[j * kBlockRows + i] * number[i][s];
                    at(sums + j * kLanes, first + s) = sum;
                }
            }
        }
    }

    // sums [height, k] = blocks right^T, of right [strips, k, kLanes].
    GENFT_INTO_EACH static void sum_columns(const Block<Wide>* blocks, int64_t strips, const Wide* right, int64_t k,
                                            int64_t height, Wide* sums) {
        for (int64_t row = 0; row < height; row += kSumRows) {
            int64_t j = 0;
            for (; j + kSumUnits <= k; j += kSumUnits) {
                sum_columns_of<kSumUnits>(blocks, strips, right, k, row, j, height, sums);
            }
            for (; j < k; ++j) sum_columns_of<1>(blocks, strips, right, k, row, j, height, sums);
        }
    }

    // Those of kSumRows rows and kUnits units.
    template <int kUnits>
    GENFT_INTO_EACH static void sum_columns_of(const Block<Wide>* blocks, int64_t strips, const Wide* right, int64_t k,
                                               int64_t row, int64_t unit, int64_t height, Wide* sums) {
        Vector sum[kSumRows][kUnits] = {};
        for (int64_t strip = 0; strip < strips; ++strip) {
            const Wide* side = right + (strip * k + unit) * kLanes;
            for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
                for (int i = 0; i < kSumRows; ++i) {
#pragma GCC unroll 4
                    for (int j = 0; j < kUnits; ++j) {
                        sum[i][j] += at(blocks[strip][row + i], v) * at(side + j * kLanes, v);
                    }
                }
            }
        }
        for (int i = 0; i < kSumRows && row + i < height; ++i) {
            for (int j = 0; j < kUnits; ++j) {
                Wide total = 0;
                for (int lane = 0; lane < kWidth; ++lane) total += sum[i][j][lane];
                sums[(row + i) * k + unit + j] = total;
            }
        }
    }
};

}  // namespace genft::cpu
