// The activations and their slopes on a CPU, without branches or calls in float32, so that compilers make vectors of
// them; and the 16-bit formats. Errors are a few units of float32's last place. In float64 the C library computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Into every version that a compiler makes of a function for different CPUs.
#define GENFT_INTO_EACH __attribute__((always_inline)) inline
#define GENFT_INTO_LAMBDA __attribute__((always_inline))

namespace genft::cpu {

template <class To, class From>
GENFT_INTO_EACH To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// --- exponentials ----------------------------------------------------------------------------------------------------

// e^y = power * (1 + rest): power = 2^n, and rest = e^r - 1, |r| <= ln(2) / 2, as exact where it is small.
struct Exponential {
    float power, rest;
};

// y from -87 to 88; NaN stays NaN.
GENFT_INTO_EACH Exponential exponential(float y) {
    constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: added, it leaves no digits behind the point
    const float shifted = y * kLog2E + kToInteger, n = shifted - kToInteger;
    const float r = (y - n * kLn2High) - n * kLn2Low;
    // Taylor's: the term left out is below r * 2^-26.
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    const uint32_t exponent = bits_of<uint32_t>(shifted) + 127u;
    return {bits_of<float>(exponent << 23), sum * (r * r) + r};
}

// e^y for y <= 0; below -87 that of -87, which is nothing beside 1.
GENFT_INTO_EACH float exp_of_negative(float y) {
    const Exponential e = exponential(y < -87.0f ? -87.0f : y);
    return e.power * e.rest + e.power;
}
GENFT_INTO_EACH double exp_of_negative(double y) { return std::exp(y); }

GENFT_INTO_EACH float tanh_of(float z) {
    const float a = std::fabs(z);
    const Exponential e = exponential(a > 10.0f ? 20.0f : 2.0f * a);
    const float expm1 = e.power * e.rest + (e.power - 1.0f);  // e^2a - 1, exact where a is small
    return std::copysign(expm1 / (expm1 + 2.0f), z);
}
GENFT_INTO_EACH double tanh_of(double z) { return std::tanh(z); }

// Phi(-a) of the normal distribution, a >= 0, given e^(-a^2 / 2): times a polynomial in u = 0.35 a / (1 + 0.35 a),
// which is 1/2 at 0; fitted to a relative error of 3e-8 up to a = 14.
GENFT_INTO_EACH float normal_tail(float a, float gauss) {
    constexpr float kFit[] = {0.5f,          -1.13983333f,  0.900906742f, -0.158700749f, -0.16523613f,
                              0.0431857593f, -0.0387891904f, 0.143096119f, -0.112211816f, 0.0275803059f};
    const float u = 0.35f * a / (1.0f + 0.35f * a);
    float sum = kFit[9];
    for (int i = 8; i >= 0; --i) sum = sum * u + kFit[i];
    return gauss * sum;
}
GENFT_INTO_EACH double normal_tail(double a, double) { return 0.5 * std::erfc(a * 0.70710678118654752440); }

// --- activations: z -> value, and gradient of the value -> gradient of z ---------------------------------------------

struct Relu {
    template <class T>
    GENFT_INTO_EACH static T apply(T z, T& grad) {
        grad = z <= T(0) ? T(0) : grad;
        return z < T(0) ? T(0) : z;
    }
};

struct LeakyRelu {
    template <class T>
    GENFT_INTO_EACH static T apply(T z, T& grad) {
        const T slope = z > T(0) ? T(1) : T(0.01);
        grad *= slope;
        return z * slope;
    }
};

struct Gelu {
    template <class T>
    GENFT_INTO_EACH static T apply(T z, T& grad) {
        const T gauss = exp_of_negative(T(-0.5) * z * z), tail = normal_tail(std::fabs(z), gauss);
        const T below = z < T(0) ? tail : T(1) - tail;  // Phi(z)
        grad *= below + z * (T(0.39894228040143267794) * gauss);
        return z * below;
    }
};

struct Silu {
    template <class T>
    GENFT_INTO_EACH static T apply(T z, T& grad) {
        const T e = exp_of_negative(-std::fabs(z)), positive = T(1) / (T(1) + e);
        const T sigmoid = z < T(0) ? e * positive : positive, other = z < T(0) ? positive : e * positive;
        grad *= sigmoid * (T(1) + z * other);
        return z * sigmoid;
    }
};

struct Tanh {
    template <class T>
    GENFT_INTO_EACH static T apply(T z, T& grad) {
        const T value = tanh_of(z);
        grad *= T(1) - value * value;
        return value;
    }
};

// --- number formats --------------------------------------------------------------------------------------------------

// How numbers are stored, what they are computed in, and how many of its bits a stored one lacks. What is stored was
// rounded before, but for float16's smallest and largest.
template <class Number>
struct Plain {
    using Stored = Number;
    using Wide = Number;
    static constexpr int kDroppedBits = 0;
    GENFT_INTO_EACH static Wide load(Stored stored) { return stored; }
    GENFT_INTO_EACH static Stored store(Wide value) { return value; }
};

struct BFloat16 {
    using Stored = uint16_t;
    using Wide = float;
    static constexpr int kDroppedBits = 16;
    GENFT_INTO_EACH static float load(uint16_t stored) { return bits_of<float>(uint32_t(stored) << 16); }
    GENFT_INTO_EACH static uint16_t store(float value) { return uint16_t(bits_of<uint32_t>(value) >> 16); }
};

struct Float16 {
    using Stored = uint16_t;
    using Wide = float;
    static constexpr int kDroppedBits = 13;
    GENFT_INTO_EACH static float load(uint16_t stored) {
        const uint32_t digits = uint32_t(stored & 0x7FFFu) << 13, sign = uint32_t(stored & 0x8000u) << 16;
        const uint32_t bits = bits_of<uint32_t>(bits_of<float>(digits) * 0x1p112f);  // to float32's exponents
        return bits_of<float>(sign | bits | ((stored & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u));
    }
    GENFT_INTO_EACH static uint16_t store(float value) {  // to nearest, ties to even
        const float a = std::fabs(value);
        const uint32_t bits = bits_of<uint32_t>(a), sign = (bits_of<uint32_t>(value) >> 16) & 0x8000u;
        const uint32_t normal = (bits + 0xFFFu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
        const uint32_t small = bits_of<uint32_t>(a + 0.5f) - bits_of<uint32_t>(0.5f);  // in units of 2^-24
        uint32_t result = a < 0x1p-14f ? small : normal;
        result = a >= 65520.0f ? 0x7C00u : result;
        return uint16_t(sign | (value == value ? result : 0x7E00u));
    }
};

}  // namespace genft::cpu
