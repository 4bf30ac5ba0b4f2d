// The token side without a folded W: extended K (factored), and the update's tile made in the main loop (few tokens).
#include "update.cuh"

namespace genft {
namespace {

// out [t, m] = tokens [t, n] matrix[m, n]^T + scale * small [t, k] thin[m, k]^T + bias, in one accumulator.
template <int kTile, bool kTransposed, class T>
__global__ void __launch_bounds__(Warps<kTile>::kThreads)
    extended_k_kernel(Matrix<T> tokens, Matrix<T> matrix, const T* bias, Matrix<T> small, Matrix<T> thin, T* out,
                      float scale) {
    constexpr int kThreads = Warps<kTile>::kThreads;
    auto& shared = shared_memory<Buffers<T, kTile>>();
    const int row = blockIdx.x * kTile, column = blockIdx.y * kTile, t = tokens.rows, m = thin.rows;

    Accumulator<kTile> y;
    rank_k(y, shared.operand[0], small, thin, row, column);
    y.for_each([&](int, int, float& element) { element *= scale; });
    __syncthreads();  // the operands are free
    pipelined(
        ceil_divide(tokens.columns, kDepth),
        [&](int step, int buffer) {
            load_operand<false, kTile, kThreads>(shared.operand[buffer][0], tokens, row, step * kDepth);
            load_operand<kTransposed, kTile, kThreads>(shared.operand[buffer][1], matrix, column, step * kDepth);
        },
        [&](int buffer) { multiply<false, kTransposed>(y, shared.operand[buffer][0], shared.operand[buffer][1]); });

    y.store(shared.stage);
    __syncthreads();
    for_each_element<kTile>([&](int r, int c) {
        if (row + r >= t || column + c >= m) return;
        float element = shared.stage.at(r, c);
        if (bias != nullptr) element += static_cast<float>(read(bias + column + c));
        write(out + static_cast<int64_t>(row + r) * m + column + c, T(element));
    });
}

template <class T>
struct MainLoopShared {
    // In float32 one buffer must do, or the whole would not fit into the 99 KiB of the smaller cards.
    static constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;
    Operand<T> tokens[kBuffers], weight[kBuffers], update;
    union {
        Operand<T> factor[2];
        Stage<> stage;  // their product takes their place
    };
};

// tokens (W + scale U)^T + bias, or, with kOverOut, tokens (W + scale U); U = drop(activation(b h^T)) [out, in].
// W is read once, and a tile of U made beside each of its tiles.
template <bool kOverOut, class T>
__global__ void __launch_bounds__(Warps<kEdge>::kThreads)
    main_loop_kernel(Matrix<T> tokens, Matrix<T> weight, bool transposed, const T* bias, Matrix<T> b, Matrix<T> h,
                     Dropout dropout, T* out, float scale, int activation) {
    constexpr int kThreads = Warps<kEdge>::kThreads, kBuffers = MainLoopShared<T>::kBuffers;
    auto& shared = shared_memory<MainLoopShared<T>>();
    const int n_out = b.rows, n_kept = kOverOut ? h.rows : n_out, n_summed = kOverOut ? n_out : h.rows;
    const int token = blockIdx.x * kEdge, kept = blockIdx.y * kEdge;
    const uint64_t key = dropout.key();
    const auto load = [&](int summed) {
        const int buffer = summed / kEdge % kBuffers;
        load_operand<false, kEdge, kThreads>(shared.tokens[buffer], tokens, token, summed);
        // A tile lies in shared memory as it lies in memory.
        const bool summed_first = kOverOut != transposed;
        load_tile<kEdge, kEdge, kThreads>(shared.weight[buffer].value, weight, summed_first ? summed : kept,
                                          summed_first ? kept : summed);
    };

    // Two sums in float32: W + scale U in 16 bits would lose U.
    Accumulator<> frozen, updated;  // [token, kept]
    load(0);
    for (int summed = 0; summed < n_summed; summed += kEdge) {
        const int buffer = summed / kEdge % kBuffers, row = kOverOut ? summed : kept, column = kOverOut ? kept : summed;
        Accumulator<> s;  // [out, in]
        rank_k(s, shared.factor, b, h, row, column);
        // All copies have been waited for; the next ones are under way while U is made and multiplied.
        if (kBuffers == 2 && summed + kEdge < n_summed) load(summed + kEdge);
        commit_copies();
        __syncthreads();  // the factors' room is free
        s.store(shared.stage);
        __syncthreads();  // s is there
        for_each_four([&](int r, int c) {
            const Four keep = keep_factors(dropout, key, column + c, row + r, n_out);
            for (int e = 0; e < 4; ++e) {
                const float u = activate(shared.stage.at(r + e, c), activation) * keep.value[e];
                shared.update.value[(r + e) * kRow<T, kEdge> + c] = T(u);
            }
        });
        __syncthreads();  // U is there
        if (transposed) {
            multiply<false, !kOverOut>(frozen, shared.tokens[buffer], shared.weight[buffer]);
        } else {
            multiply<false, kOverOut>(frozen, shared.tokens[buffer], shared.weight[buffer]);
        }
        multiply<false, kOverOut>(updated, shared.tokens[buffer], shared.update);
        if (kBuffers == 1 && summed + kEdge < n_summed) {
            __syncthreads();  // the one buffer is free
            load(summed + kEdge);
        }
    }

    frozen.store(shared.stage);
    updated.for_each([&](int r, int c, float element) { shared.stage.at(r, c) += scale * element; });
    __syncthreads();
    for_each_element<kEdge>([&](int r, int c) {
        if (token + r >= tokens.rows || kept + c >= n_kept) return;
        float element = shared.stage.at(r, c);
        if (bias != nullptr) element += static_cast<float>(read(bias + kept + c));
        write(out + static_cast<int64_t>(token + r) * n_kept + kept + c, T(element));
    });
}

}  // namespace

int extended_k(const void* tokens, int64_t tokens_stride, const void* matrix, int64_t stride, bool transposed,
               const void* bias, const void* small, const void* thin, void* out, int t, int m, int n, int k,
               float scale, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto start = [&](auto tile) {
            constexpr int kTile = decltype(tile)::value;
            const auto kernel = transposed ? extended_k_kernel<kTile, true, T> : extended_k_kernel<kTile, false, T>;
            return launch<Buffers<T, kTile>>(
                kernel, dim3(ceil_divide(t, kTile), ceil_divide(m, kTile)), Warps<kTile>::kThreads, stream,
                stored<T>(tokens, tokens_stride, false, t, n), stored<T>(matrix, stride, transposed, m, n),
                static_cast<const T*>(bias), stored<T>(small, k, false, t, k), stored<T>(thin, k, false, m, k),
                static_cast<T*>(out), scale);
        };
        if constexpr (sizeof(T) == 2) {  // the larger tile reads less; few tokens would leave it empty
            if (t > kEdge) return start(std::integral_constant<int, 128>());
        }
        return start(std::integral_constant<int, kEdge>());
    });
}

int main_loop(const void* tokens, int64_t tokens_stride, const void* weight, int64_t stride, bool transposed,
              const void* bias, const void* b, const void* h, const int64_t* seed, void* out, int t, int n_out,
              int n_in, int k, bool over_out, uint32_t threshold, float keep_scale, uint32_t random_stream,
              float scale, int activation, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = over_out ? main_loop_kernel<true, T> : main_loop_kernel<false, T>;
        return launch<MainLoopShared<T>>(
            kernel, dim3(ceil_divide(t, kEdge), ceil_divide(over_out ? n_in : n_out, kEdge)), Warps<kEdge>::kThreads,
            stream, stored<T>(tokens, tokens_stride, false, t, over_out ? n_out : n_in),
            stored<T>(weight, stride, transposed, n_out, n_in), transposed, static_cast<const T*>(bias),
            stored<T>(b, k, false, n_out, k), stored<T>(h, k, false, n_in, k),
            Dropout{seed, threshold, keep_scale, random_stream}, static_cast<T*>(out), scale, activation);
    });
}

}  // namespace genft
