// Fold the update into W: out = W + scale U, U = drop(activation(b h^T)), rounded so that 16 bits do not lose U.
#include "update.cuh"

namespace genft {
namespace {

template <class T>
struct FoldShared {
    Operand<T> factor[2], weight;
    Stage stage;
};

// A block has one tile [out, in] of W. It lies in shared memory as W does in memory, and so does `out`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(Matrix<T> weight, bool transposed, Matrix<T> b, Matrix<T> h, Dropout dropout, T* out, float scale,
                int activation) {
    auto& shared = shared_memory<FoldShared<T>>();
    const int row = blockIdx.x * kEdge, column = blockIdx.y * kEdge, n_out = b.rows;
    const int first = transposed ? column : row, second = transposed ? row : column;  // in W's memory
    const uint64_t key = dropout.key();

    load_tile<kEdge, kEdge>(shared.weight.value, weight, first, second);
    Accumulator s;
    rank_k(s, shared.factor, b, h, row, column);
    s.store(shared.stage);
    __syncthreads();  // W and s are there
    for_each_four([&](int r, int c) {
        const Four keep = keep_factors(dropout, key, column + c, row + r, n_out);
        Words words = {};
        if constexpr (kDroppedBits<T> > 0) {
            words = philox4x32(block_counter(column + c, row + r, n_out), kRoundingStream, key);
        }
        for (int e = 0; e < 4; ++e) {
            const float u = activate(shared.stage.at(r + e, c), activation) * keep.value[e];
            T& w = shared.weight.value[transposed ? c * kRow<T, kEdge> + r + e : (r + e) * kRow<T, kEdge> + c];
            w = round_stochastically<T>(static_cast<float>(w) + scale * u, words.word[e]);
        }
    });
    __syncthreads();  // the folded tile is there
    store_tile(out, weight.rows, weight.columns, shared.weight.value, first, second);
}

}  // namespace

int fold(const BigMatrix& weight, const Update& update, float scale, void* out, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int n_out = update.n_out, n_in = update.n_in, k = update.k;
        return launch<FoldShared<T>>(
            fold_kernel<T>, dim3(ceil_divide(n_out, kEdge), ceil_divide(n_in, kEdge)), kThreads, stream,
            stored<T>(weight.data, weight.stride, weight.transposed, n_out, n_in), weight.transposed,
            stored<T>(update.left, k, false, n_out, k), stored<T>(update.right, k, false, n_in, k), dropout_of(update),
            static_cast<T*>(out), scale, update.activation);
    });
}

}  // namespace genft
