// CUDA on a CPU, for tests: what csrc/device.cuh takes from the machine, with the checks that a GPU does not make.
//
// Launches run at once. An access outside the registered buffers or shared memory, a deadlock, or a copy never waited
// for ends the launch with an error code, and error_string tells what happened.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define blockIdx (cuda_host::block.block)
#define threadIdx (cuda_host::Index{static_cast<unsigned>(cuda_host::block.running), 0, 0})

using std::isfinite;
using std::min;

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void __syncthreads() {
    cuda_host::meet(cuda_host::block.barrier, "the barrier", cuda_host::block.threads, -1, nullptr, [] {});
}

inline const char* cudaGetErrorString(cudaError_t code) {
    if (code == cudaErrorInvalidValue) return "invalid argument";
    if (code == cudaErrorInvalidConfiguration) return "invalid configuration argument";
    return cuda_host::last_failure.c_str();
}

namespace genft {

template <class Layout>
Layout& shared_memory() {
    return *static_cast<Layout*>(cuda_host::block.shared.begin());
}

inline void check_global(const void* pointer, size_t bytes, const char* what) {
    if (!cuda_host::is_in_a_buffer(pointer, bytes)) cuda_host::fail(std::string(what) + " outside all buffers");
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) cuda_host::fail(std::string(what) + " not aligned");
}
inline void check_shared(const void* pointer) {
    if (!cuda_host::block.shared.contains(pointer, 16)) cuda_host::fail("16 bytes outside shared memory");
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) cuda_host::fail("16 bytes of shared memory not aligned");
}

template <class T>
T read(const T* from) {
    check_global(from, sizeof(T), "read");
    return *from;
}
template <class T>
void write(T* to, T value) {
    check_global(to, sizeof(T), "write");
    *to = value;
}
inline void write_16_bytes(void* to, const void* from) {
    check_global(to, 16, "write");
    check_shared(from);
    std::memcpy(to, from, 16);
}

// A copy may land at any time between its start and the wait for it: until then its target is poisoned.
inline void copy_16_bytes_async(void* to, const void* from) {
    check_global(from, 16, "copy");
    check_shared(to);
    std::memset(to, cuda_host::kPoison, 16);
    cuda_host::current().copies.push_back({to, from, cuda_host::current().group});
}
inline void commit_copies() { ++cuda_host::current().group; }
template <int kPending>
void wait_for_copies() {
    auto& copies = cuda_host::current().copies;
    while (!copies.empty() && copies.front().group < cuda_host::current().group - kPending) {
        std::memcpy(copies.front().to, copies.front().from, 16);
        copies.pop_front();
    }
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
    struct Lane {
        uint32_t* to;
        const uint16_t* row;
    } lane{to, static_cast<const uint16_t*>(row)};
    check_shared(row);
    cuda_host::with_warp(kTransposed ? "load_matrices, transposed" : "load_matrices", lane, [](Lane** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](int r, int c) -> uint32_t { return lanes[matrix * 8 + r]->row[c]; };
            for (int l = 0; l < 32; ++l) {
                const int g = l / 4, q = l % 4 * 2;
                lanes[l]->to[matrix] = kTransposed ? element(q, g) | element(q + 1, g) << 16
                                                   : element(g, q) | element(g, q + 1) << 16;
            }
        }
    });
}

inline float to_float(uint32_t bits, __nv_bfloat16*) { return __uint_as_float(bits << 16); }
inline float to_float(uint32_t bits, __half*) {
    static const std::vector<float> values = [] {
        std::vector<float> all(1 << 16);
        for (uint32_t i = 0; i < all.size(); ++i) {
            __half_raw raw;
            raw.x = static_cast<uint16_t>(i);
            all[i] = __half2float(__half(raw));
        }
        return all;
    }();
    return values[bits];
}

template <class T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } lane{c, a, {b0, b1}};
    cuda_host::with_warp("multiply_matrices", lane, [](Lane** lanes) {
        float left[16][16], right[16][8], sum[16][8];
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, q = l % 4 * 2;
            for (int i = 0; i < 8; ++i) {  // four pairs
                const int pair = i / 2;
                left[g + pair % 2 * 8][q + i % 2 + pair / 2 * 8] =
                    to_float(lanes[l]->a[pair] >> i % 2 * 16 & 0xFFFF, static_cast<T*>(nullptr));
            }
            for (int i = 0; i < 4; ++i) {  // two pairs
                right[q + i % 2 + i / 2 * 8][g] =
                    to_float(lanes[l]->b[i / 2] >> i % 2 * 16 & 0xFFFF, static_cast<T*>(nullptr));
            }
            for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][q + i % 2] = lanes[l]->c[i];
        }
        for (int m = 0; m < 16; ++m) {
            for (int d = 0; d < 16; ++d) {
                for (int n = 0; n < 8; ++n) sum[m][n] += left[m][d] * right[d][n];
            }
        }
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) lanes[l]->c[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
    });
}

template <class Layout, class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*, const Arguments&... arguments) {
    constexpr unsigned kMost = 65535;  // of the second and third dimension
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > kMost || grid.z > kMost) {
        return cudaErrorInvalidConfiguration;
    }
    const std::tuple<std::decay_t<Parameters>...> values(arguments...);
    const auto body = [kernel, &values] { std::apply(kernel, values); };
    return cuda_host::run({grid.x, grid.y, grid.z}, threads, sizeof(Layout), body) ? cudaSuccess
                                                                                   : cudaErrorLaunchFailure;
}

}  // namespace genft
