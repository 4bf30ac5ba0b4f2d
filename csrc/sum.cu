// Sums of parts, in a fixed order: what kernels leave that cut a long sum, or have a part for each tile.
#include "update.cuh"

namespace genft {
namespace {

struct Nothing {};  // of shared memory

// Element `at` of the sum of parts [count, size], and what becomes of it.
template <class T>
__device__ __forceinline__ void sum_of(const float* parts, int count, int64_t size, const Outcome& outcome, int k,
                                       int64_t at) {
    if (at >= size) return;
    float total = 0.0f;
#pragma unroll 8
    for (int part = 0; part < count; ++part) total += read(parts + part * size + at);
    finish(static_cast<T*>(outcome.out), static_cast<T*>(outcome.pre), static_cast<const T*>(outcome.bias), at,
           static_cast<int>(at % k), total, outcome.activation);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(Sum first, Sum second, int k) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    sum_of<T>(first.parts, first.count, first.size, first.outcome, k, at);
    if (second.parts != nullptr) sum_of<T>(second.parts, second.count, second.size, second.outcome, k, at);
}

}  // namespace

int sum_parts(const Sum& first, const Sum& second, int k, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t size = first.size > second.size ? first.size : second.size;
        const dim3 grid(static_cast<unsigned>((size + kThreads - 1) / kThreads));
        return launch<Nothing>(sum_parts_kernel<T>, grid, kThreads, stream, first, second, k);
    });
}

}  // namespace genft
