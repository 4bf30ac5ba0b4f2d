// Philox words for many elements of a row at once. Compilers spend two to four times as many instructions on the
// product of 32-bit numbers whose 64 bits are wanted, so x86 CPUs with AVX2 or AVX-512 get it by hand: numbers of 32
// bits in lanes of 64, with garbage in the upper half, which the product ignores.
#pragma once

#include <cstdint>

#include "cpu_thin.h"
#include "philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genft::cpu {

// The words of kLanes counters, `step` apart.
using ManyWords = uint32_t[4][kLanes];
using Draw = void (*)(uint64_t counter, uint64_t step, uint32_t stream, uint64_t seed, ManyWords& words);

inline void draw_portably(uint64_t counter, uint64_t step, uint32_t stream, uint64_t seed, ManyWords& words) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Words four = philox4x32(counter + lane * step, stream, seed);
        for (int j = 0; j < 4; ++j) words[j][lane] = four.word[j];
    }
}

#if defined(__x86_64__)

__attribute__((target("avx512f"))) inline void draw_by_avx512(uint64_t counter, uint64_t step, uint32_t stream,
                                                              uint64_t seed, ManyWords& words) {
    constexpr int kTogether = 2, kXor = 0x96;  // vectors in flight; of three
    const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0), multiplier1 = _mm512_set1_epi64(kMultiplier1);
    for (int64_t lane = 0; lane < kLanes; lane += 8 * kTogether) {
        __m512i c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
        for (int v = 0; v < kTogether; ++v) {
            alignas(64) uint64_t counters[8];
            for (int i = 0; i < 8; ++i) counters[i] = counter + (lane + 8 * v + i) * step;
            c0[v] = _mm512_load_si512(counters);
            c1[v] = _mm512_srli_epi64(c0[v], 32);
            c2[v] = _mm512_set1_epi64(stream);
            c3[v] = _mm512_setzero_si512();
        }
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1) {
            const __m512i keys0 = _mm512_set1_epi64(key0), keys1 = _mm512_set1_epi64(key1);
            for (int v = 0; v < kTogether; ++v) {
                const __m512i product0 = _mm512_mul_epu32(c0[v], multiplier0);
                const __m512i product1 = _mm512_mul_epu32(c2[v], multiplier1);
                c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[v], keys0, kXor);
                c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[v], keys1, kXor);
                c1[v] = product1;
                c3[v] = product0;
            }
        }
        for (int v = 0; v < kTogether; ++v) {
            const int64_t at = lane + 8 * v;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[0] + at), _mm512_cvtepi64_epi32(c0[v]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[1] + at), _mm512_cvtepi64_epi32(c1[v]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[2] + at), _mm512_cvtepi64_epi32(c2[v]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[3] + at), _mm512_cvtepi64_epi32(c3[v]));
        }
    }
}

__attribute__((target("avx2"), always_inline)) inline void store_lower_halves(const __m256i (&pair)[2], uint32_t* to) {
    const __m256 first = _mm256_castsi256_ps(pair[0]), second = _mm256_castsi256_ps(pair[1]);
    const __m256i mixed = _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xD8));
}

__attribute__((target("avx2"))) inline void draw_by_avx2(uint64_t counter, uint64_t step, uint32_t stream,
                                                         uint64_t seed, ManyWords& words) {
    constexpr int kTogether = 2;
    const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
    for (int64_t lane = 0; lane < kLanes; lane += 4 * kTogether) {
        __m256i c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
        for (int v = 0; v < kTogether; ++v) {
            const uint64_t first = counter + (lane + 4 * v) * step;
            c0[v] = _mm256_setr_epi64x(first, first + step, first + 2 * step, first + 3 * step);
            c1[v] = _mm256_srli_epi64(c0[v], 32);
            c2[v] = _mm256_set1_epi64x(stream);
            c3[v] = _mm256_setzero_si256();
        }
        uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, key0 += kWeyl0, key1 += kWeyl1) {
            const __m256i keys0 = _mm256_set1_epi64x(key0), keys1 = _mm256_set1_epi64x(key1);
            for (int v = 0; v < kTogether; ++v) {
                const __m256i product0 = _mm256_mul_epu32(c0[v], multiplier0);
                const __m256i product1 = _mm256_mul_epu32(c2[v], multiplier1);
                const __m256i high0 = _mm256_srli_epi64(product0, 32), high1 = _mm256_srli_epi64(product1, 32);
                c0[v] = _mm256_xor_si256(_mm256_xor_si256(high1, c1[v]), keys0);
                c2[v] = _mm256_xor_si256(_mm256_xor_si256(high0, c3[v]), keys1);
                c1[v] = product1;
                c3[v] = product0;
            }
        }
        store_lower_halves(c0, words[0] + lane);
        store_lower_halves(c1, words[1] + lane);
        store_lower_halves(c2, words[2] + lane);
        store_lower_halves(c3, words[3] + lane);
    }
}

#endif

// The fastest for this CPU; for the one that the compiler is told where GENFT_ONE_CPU is defined.
inline Draw fastest_draw() {
#if defined(__x86_64__) && defined(GENFT_ONE_CPU)
#if defined(__AVX512F__)
    return draw_by_avx512;
#elif defined(__AVX2__)
    return draw_by_avx2;
#endif
#elif defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return draw_by_avx512;
    if (__builtin_cpu_supports("avx2")) return draw_by_avx2;
#endif
    return draw_portably;
}

}  // namespace genft::cpu
