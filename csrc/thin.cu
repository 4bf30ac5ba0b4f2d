// Products of big matrices and thin ones, for a list of layers: the column stage and its backward, x h, dy b, dh, db.
#include <algorithm>

#include "update.cuh"

namespace genft {
namespace {

// The layers' matrices travel with the launch: nothing is uploaded, also under graph capture.
constexpr int kMaxLayers = 256;
struct MatrixList {
    const void* data[kMaxLayers];
};

MatrixList list_of(const void* const* matrices, int layers) {
    MatrixList list = {};
    std::copy(matrices, matrices + layers, list.data);
    return list;
}

// out [m, k] = activation(matrix [m, n] thin[k, n]^T + bias), and pre what the activation is applied to.
template <bool kTransposed, class T>
__global__ void __launch_bounds__(kThreads)
    thin_product_kernel(const __grid_constant__ MatrixList matrices, int64_t stride, const T* thins, const T* bias,
                        T* outs, T* pres, int m, int n, int k, int activation) {
    auto& shared = shared_memory<Buffers<T>>();
    const int row = blockIdx.x * kEdge, unit = blockIdx.y * kEdge, layer = blockIdx.z;
    const auto* data = static_cast<const T*>(matrices.data[layer]);
    const Matrix<T> matrix = {data, stride, kTransposed ? n : m, kTransposed ? m : n};
    const Matrix<T> thin = of_stack(thins, layer, k, n);

    Accumulator z;
    pipelined(
        ceil_divide(n, kDepth),
        [&](int step, int buffer) {
            load_operand<kTransposed>(shared.operand[buffer][0], matrix, row, step * kDepth);
            load_operand<false>(shared.operand[buffer][1], thin, unit, step * kDepth);
        },
        [&](int buffer) {
            multiply<kTransposed, false>(z, shared.operand[buffer][0], shared.operand[buffer][1], kDepth, k - unit);
        });

    z.store(shared.stage);
    __syncthreads();
    for_each_element([&](int r, int c) {
        if (row + r >= m || unit + c >= k) return;
        const int64_t at = (static_cast<int64_t>(layer) * m + row + r) * k + unit + c;
        float argument = shared.stage.at(r, c);
        if (bias != nullptr) argument += static_cast<float>(read(bias + unit + c));
        if (activation != kIdentity) {
            const T rounded = T(argument);  // the gradient will see the rounded one, so the activation does too
            write(pres + at, rounded);
            argument = activate(static_cast<float>(rounded), activation);
        }
        write(outs + at, T(argument));
    });
}

// out [layer, split, k, n] = thin[m, k]^T matrix [m, n] over the split's rows.
template <bool kTransposed, class T>
__global__ void __launch_bounds__(kThreads)
    thin_transposed_kernel(const __grid_constant__ MatrixList matrices, int64_t stride, const T* thins, float* outs,
                           int m, int n, int k, int rows_per_split, int splits) {
    auto& shared = shared_memory<Buffers<T>>();
    const int column = blockIdx.x * kEdge, unit = blockIdx.y * kEdge;
    const int layer = blockIdx.z / splits, first = blockIdx.z % splits * rows_per_split;
    const auto* data = static_cast<const T*>(matrices.data[layer]);
    const Matrix<T> matrix = {data, stride, kTransposed ? n : m, kTransposed ? m : n};
    const Matrix<T> thin = of_stack(thins, layer, m, k);

    Accumulator total;  // [unit, column]
    pipelined(
        ceil_divide(min(rows_per_split, m - first), kDepth),
        [&](int step, int buffer) {
            const int depth = first + step * kDepth;
            load_operand<true>(shared.operand[buffer][0], thin, unit, depth);
            load_operand<!kTransposed>(shared.operand[buffer][1], matrix, column, depth);
        },
        [&](int buffer) {
            multiply<true, !kTransposed>(total, shared.operand[buffer][0], shared.operand[buffer][1]);
        });

    total.store(shared.stage);
    __syncthreads();
    for_each_element([&](int r, int c) {
        if (unit + r >= k || column + c >= n) return;
        write(outs + (static_cast<int64_t>(blockIdx.z) * k + unit + r) * n + column + c, shared.stage.at(r, c));
    });
}

}  // namespace

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int thin_product(const void* const* matrices, int64_t stride, bool transposed, const void* thin, const void* bias,
                 void* out, void* pre, int layers, int m, int n, int k, int activation, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = transposed ? thin_product_kernel<true, T> : thin_product_kernel<false, T>;
        for (int64_t first = 0; first < layers; first += kMaxLayers) {
            const int count = static_cast<int>(std::min<int64_t>(kMaxLayers, layers - first));
            const int code = launch<Buffers<T>>(
                kernel, dim3(ceil_divide(m, kEdge), ceil_divide(k, kEdge), count), kThreads, stream,
                list_of(matrices + first, count), stride, static_cast<const T*>(thin) + first * k * n,
                static_cast<const T*>(bias), static_cast<T*>(out) + first * m * k,
                pre == nullptr ? nullptr : static_cast<T*>(pre) + first * m * k, m, n, k, activation);
            if (code != cudaSuccess) return code;
        }
        return cudaSuccess;
    });
}

int thin_transposed(const void* thin, const void* const* matrices, int64_t stride, bool transposed, float* out,
                    int layers, int m, int n, int k, int rows_per_split, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = transposed ? thin_transposed_kernel<true, T> : thin_transposed_kernel<false, T>;
        const int splits = std::max(1, ceil_divide(m, rows_per_split));
        for (int64_t first = 0; first < layers; first += kMaxLayers) {
            const int count = static_cast<int>(std::min<int64_t>(kMaxLayers, layers - first));
            const int code = launch<Buffers<T>>(
                kernel, dim3(ceil_divide(n, kEdge), ceil_divide(k, kEdge), count * splits), kThreads,
                stream, list_of(matrices + first, count), stride, static_cast<const T*>(thin) + first * m * k,
                out + first * splits * k * n, m, n, k, rows_per_split, splits);
            if (code != cudaSuccess) return code;
        }
        return cudaSuccess;
    });
}

}  // namespace genft
