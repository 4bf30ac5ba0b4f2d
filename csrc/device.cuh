// The machine: the few instructions and launch details that C++ has no words for, each in a named wrapper.
//
// Without nvcc, tests/cuda_host provides the same names, and the kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "genft.h"

#if !defined(__CUDACC__)
#include "cuda_host.h"
#else
#include <cuda_runtime.h>

namespace genft {

// The block's dynamic shared memory as a structure; the launch asks for its size.
template <class Layout>
__device__ __forceinline__ Layout& shared_memory() {
    extern __shared__ __align__(16) unsigned char genft_shared_memory[];
    return *reinterpret_cast<Layout*>(genft_shared_memory);
}

// Every access to global memory goes through one of these and the copies below.
template <class T>
__device__ __forceinline__ T read(const T* from) {
    return *from;
}
template <class T>
__device__ __forceinline__ void write(T* to, T value) {
    *to = value;
}
// 16 bytes, aligned, from shared to global memory.
__device__ __forceinline__ void write_16_bytes(void* to, const void* from) {
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, aligned, from global to shared memory; there after the wait for its group, for other threads after a
// barrier as well.
__device__ __forceinline__ void copy_16_bytes_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most the newest kPending groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 i + j gives the address of row j of matrix i. Of matrix i, lane l
// gets elements (l / 4, 2 (l % 4)) and the one after it, or, transposed, (2 (l % 4), l / 4) and the one below.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4, q = lane % 4 a lane has of c the elements (g, 2q), (g, 2q + 1),
// (g + 8, 2q), (g + 8, 2q + 1); of a the pairs from (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8); of b^T the
// pairs from (g, 2q), (g, 2q + 8).
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_matrices<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                                 uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_matrices<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                          uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a kernel whose shared memory is one `Layout`; a cudaError_t as int.
template <class Layout, class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Arguments&... arguments) {
    constexpr int kWithoutAsking = 48 << 10, kOfSmallestCard = 99 << 10;  // bytes
    static_assert(sizeof(Layout) <= kOfSmallestCard);
    if (sizeof(Layout) > kWithoutAsking) {
        const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(sizeof(Layout)));
        if (code != cudaSuccess) return cudaGetLastError();  // which also clears it for the next launch
    }
    kernel<<<grid, threads, sizeof(Layout), static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace genft
#endif

namespace genft {

// Calls f with a null pointer of the type that a `DType` means.
template <class F>
int with_type(int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(static_cast<float*>(nullptr));
        case kFloat16: return f(static_cast<__half*>(nullptr));
        case kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace genft
