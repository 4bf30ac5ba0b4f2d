// Products of big matrices and thin ones, for a list of layers: the column stage and its backward.
#include <algorithm>

#include "update.cuh"

namespace genft {
namespace {

// The layers' matrices travel with the launch: nothing is uploaded, also under graph capture.
constexpr int kMaxLayers = 256;
struct MatrixList {
    const void* data[kMaxLayers];
};

// start(list, its first layer, their number) for each list of layers; the first error, if there is one.
template <class F>
int for_each_list(const BigMatrices& matrices, F start) {
    for (int first = 0; first < matrices.layers; first += kMaxLayers) {
        const int count = std::min(kMaxLayers, matrices.layers - first);
        MatrixList list = {};
        std::copy(matrices.data + first, matrices.data + first + count, list.data);
        if (const int code = start(list, first, count); code != cudaSuccess) return code;
    }
    return cudaSuccess;
}

int splits_of(int length, int per_split) { return std::max(1, ceil_divide(length, per_split)); }

// What lies `elements` further on; null stays null.
template <class T>
T* moved(void* pointer, int64_t elements) {
    return pointer == nullptr ? nullptr : static_cast<T*>(pointer) + elements;
}

// Sizes of a product; the sum is cut into splits of `per_split`. `stack` is the number of all layers.
struct Sizes {
    int m, n, k, per_split, splits, stack;
};

// matrix [m, n] thin[k, n]^T: to outcome [layer, m, k], or the split's part to parts [split, layer, m, k].
template <bool kTransposed, class T>
__global__ void __launch_bounds__(kThreads)
    thin_product_kernel(const __grid_constant__ MatrixList matrices, int64_t stride, const T* thins, Outcome outcome,
                        float* parts, Sizes sizes) {
    auto& shared = shared_memory<Buffers<T>>();
    const int m = sizes.m, n = sizes.n, k = sizes.k;
    const int row = blockIdx.x * kEdge, unit = blockIdx.y * kEdge;
    const int layer = blockIdx.z / sizes.splits, split = blockIdx.z % sizes.splits, first = split * sizes.per_split;
    const auto* data = static_cast<const T*>(matrices.data[layer]);
    const Matrix<T> matrix = {data, stride, kTransposed ? n : m, kTransposed ? m : n};
    const Matrix<T> thin = of_stack(thins, layer, k, n);

    Accumulator z;
    pipelined(
        ceil_divide(min(sizes.per_split, n - first), kDepth),
        [&](int step, int buffer) {
            const int depth = first + step * kDepth;
            load_operand<kTransposed>(shared.operand[buffer][0], matrix, row, depth);
            load_operand<false>(shared.operand[buffer][1], thin, unit, depth);
        },
        [&](int buffer) {
            multiply<kTransposed, false>(z, shared.operand[buffer][0], shared.operand[buffer][1], kDepth, k - unit);
        });

    z.store(shared.stage);
    __syncthreads();
    for_each_element([&](int r, int c) {
        if (row + r >= m || unit + c >= k) return;
        const int64_t stacked = parts == nullptr ? layer : static_cast<int64_t>(split) * sizes.stack + layer;
        const int64_t at = (stacked * m + row + r) * k + unit + c;
        const float z = shared.stage.at(r, c);
        if (parts != nullptr) {
            write(parts + at, z);
        } else {
            finish(static_cast<T*>(outcome.out), static_cast<T*>(outcome.pre), static_cast<const T*>(outcome.bias), at,
                   unit + c, z, outcome.activation);
        }
    });
}

// thin[m, k]^T matrix [m, n]: to outs [layer, k, n], or the split's part to parts [split, layer, k, n].
template <bool kTransposed, class T>
__global__ void __launch_bounds__(kThreads)
    thin_transposed_kernel(const __grid_constant__ MatrixList matrices, int64_t stride, const T* thins, T* outs,
                           float* parts, Sizes sizes) {
    auto& shared = shared_memory<Buffers<T>>();
    const int m = sizes.m, n = sizes.n, k = sizes.k;
    const int column = blockIdx.x * kEdge, unit = blockIdx.y * kEdge;
    const int layer = blockIdx.z / sizes.splits, split = blockIdx.z % sizes.splits, first = split * sizes.per_split;
    const auto* data = static_cast<const T*>(matrices.data[layer]);
    const Matrix<T> matrix = {data, stride, kTransposed ? n : m, kTransposed ? m : n};
    const Matrix<T> thin = of_stack(thins, layer, m, k);

    Accumulator total;  // [unit, column]
    pipelined(
        ceil_divide(min(sizes.per_split, m - first), kDepth),
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
        const int64_t stacked = parts == nullptr ? layer : static_cast<int64_t>(split) * sizes.stack + layer;
        const int64_t at = (stacked * k + unit + r) * n + column + c;
        if (parts != nullptr) {
            write(parts + at, shared.stage.at(r, c));
        } else {
            write(outs + at, T(shared.stage.at(r, c)));
        }
    });
}

}  // namespace

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int thin_product(const BigMatrices& matrices, const void* thin, int k, const Outcome& outcome, float* parts,
                 int columns_per_split, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = matrices.transposed ? thin_product_kernel<true, T> : thin_product_kernel<false, T>;
        const int m = matrices.rows, n = matrices.columns, splits = splits_of(n, columns_per_split);
        const Sizes sizes = {m, n, k, columns_per_split, splits, matrices.layers};
        return for_each_list(matrices, [&](const MatrixList& list, int first, int count) {
            const int64_t skipped = static_cast<int64_t>(first) * m * k;
            return launch<Buffers<T>>(
                kernel, dim3(ceil_divide(m, kEdge), ceil_divide(k, kEdge), count * splits), kThreads, stream, list,
                matrices.stride, static_cast<const T*>(thin) + static_cast<int64_t>(first) * k * n,
                Outcome{moved<T>(outcome.out, skipped), outcome.bias, outcome.activation,
                        moved<T>(outcome.pre, skipped)},
                moved<float>(parts, skipped), sizes);
        });
    });
}

int thin_transposed(const void* thin, const BigMatrices& matrices, int k, void* out, float* parts, int rows_per_split,
                    int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) -> int {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = matrices.transposed ? thin_transposed_kernel<true, T> : thin_transposed_kernel<false, T>;
        const int m = matrices.rows, n = matrices.columns, splits = splits_of(m, rows_per_split);
        const Sizes sizes = {m, n, k, rows_per_split, splits, matrices.layers};
        return for_each_list(matrices, [&](const MatrixList& list, int first, int count) {
            const int64_t skipped = static_cast<int64_t>(first) * k * n;
            return launch<Buffers<T>>(
                kernel, dim3(ceil_divide(n, kEdge), ceil_divide(k, kEdge), count * splits), kThreads, stream, list,
                matrices.stride, static_cast<const T*>(thin) + static_cast<int64_t>(first) * m * k,
                moved<T>(out, skipped), moved<float>(parts, skipped), sizes);
        });
    });
}

}  // namespace genft
