// The elements of an update: activations and their slopes, dropout, stochastic rounding (docs/method.md#two-products,
// docs/method.md#random-numbers).
#pragma once

#include "genft.h"
#include "philox.h"
#include "tile.cuh"

namespace genft {

constexpr float kLeakySlope = 0.01f;

// phi or psi of z; NaN stays NaN.
__device__ __forceinline__ float activate(float z, int activation) {
    switch (activation) {
        case kRelu: return z < 0.0f ? 0.0f : z;
        case kLeakyRelu: return z < 0.0f ? kLeakySlope * z : z;
        case kGelu: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
        case kSilu: return z / (1.0f + expf(-z));
        case kTanh: return tanhf(z);
        default: return z;
    }
}

// The derivative at z.
__device__ __forceinline__ float slope(float z, int activation) {
    switch (activation) {
        case kRelu: return z <= 0.0f ? 0.0f : 1.0f;
        case kLeakyRelu: return z <= 0.0f ? kLeakySlope : 1.0f;
        case kGelu: return 0.5f * (1.0f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
        case kSilu: {
            const float sigmoid = 1.0f / (1.0f + expf(-z));
            return sigmoid * (1.0f + z * (1.0f - sigmoid));
        }
        case kTanh: {
            const float value = tanhf(z);
            return 1.0f - value * value;
        }
        default: return 1.0f;
    }
}

// activation(z + bias) to outs, and what the activation is applied to to pres; `at` is the place, `unit` that in a row.
template <class T>
__device__ __forceinline__ void finish(T* outs, T* pres, const T* bias, int64_t at, int unit, float z, int activation) {
    if (bias != nullptr) z += static_cast<float>(read(bias + unit));
    if (activation != kIdentity) {
        const T rounded = T(z);  // the gradient will see the rounded one, so the activation does too
        write(pres + at, rounded);
        z = activate(static_cast<float>(rounded), activation);
    }
    write(outs + at, T(z));
}

// Dropout's settings, and the seeds, one a layer; no seeds are seeds of zero.
struct Dropout {
    const int64_t* seeds;
    uint32_t threshold;  // floor(p 2^32), 0 for none
    float keep_scale;    // 1 / (1 - p)
    uint32_t stream;

    __device__ __forceinline__ uint64_t key(int layer = 0) const {
        return seeds == nullptr ? 0 : static_cast<uint64_t>(read(seeds + layer));
    }
};

inline Dropout dropout_of(const Update& update) {
    return {update.seed, update.threshold, update.keep_scale, update.stream};
}

struct Four {
    float value[4];
};

// 0 or 1 / (1 - p) for elements j to j + 3 of out at i of in; j is a multiple of 4.
__device__ __forceinline__ Four keep_factors(const Dropout& dropout, uint64_t key, int i, int j, int n_out) {
    Four keep = {{1.0f, 1.0f, 1.0f, 1.0f}};
    if (dropout.threshold != 0) {
        const Words words = philox4x32(block_counter(i, j, n_out), dropout.stream, key);
        for (int e = 0; e < 4; ++e) keep.value[e] = words.word[e] >= dropout.threshold ? dropout.keep_scale : 0.0f;
    }
    return keep;
}

// Mantissa bits that a float32 loses.
template <class T>
constexpr int kDroppedBits = 0;
template <>
constexpr int kDroppedBits<__half> = 13;
template <>
constexpr int kDroppedBits<__nv_bfloat16> = 16;

// `exact` up or down to a neighbour in T, with the odds of its distance; NaN and infinities stay what they are.
template <class T>
__device__ __forceinline__ T round_stochastically(float exact, uint32_t word) {
    constexpr int kBits = kDroppedBits<T>;
    if (kBits == 0 || !isfinite(exact)) return T(exact);
    const uint32_t rounded = (__float_as_uint(exact) + (word >> (32 - kBits) % 32)) & (0xFFFFFFFFu << kBits);
    return T(__uint_as_float(rounded));
}

// f(row, column) for the first of every four neighbours along out in a tile [out, in], which share a Philox counter.
template <class F>
__device__ __forceinline__ void for_each_four(F f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kEdge / 4 * kEdge; i += kThreads) f(i / kEdge * 4, i % kEdge);
}

}  // namespace genft
