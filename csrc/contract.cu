// The gradients of the update's factors, tiled form: a tile of G = dy^T x is contracted in the epilogue of its own
// product, P = scale G * mask * activation'(b h^T), db += P h, dh += P^T b, and never stored.
#include "update.cuh"

namespace genft {
namespace {

// A block has kSide x kSide tiles of G, which share what they read.
template <class T, int kSide>
struct ContractShared {
    union {
        Operand<T> operand[2][2 * kSide];  // two buffers of slices of dy, then of x
        Stage stage[2];                  // 0 leaves operand[1] alone
    };
    Operand<T> p;
    static_assert(sizeof(Stage) <= sizeof(Operand<T>[2]));
};

// Partial sums, added up afterwards in a fixed order: dbs [in tile, out, k], dhs [out tile, in, k].
template <int kSide, class T>
__global__ void __launch_bounds__(kThreads)
    contract_kernel(Matrix<T> dy, Matrix<T> x, Matrix<T> b, Matrix<T> h, Dropout dropout, float* dhs, float* dbs,
                    float scale, int activation) {
    auto& shared = shared_memory<ContractShared<T, kSide>>();
    auto& operand = shared.operand;
    const int out_tile = blockIdx.x * kSide, in_tile = blockIdx.y * kSide;  // the first ones of this block
    const int n_out = b.rows, n_in = h.rows, k = b.columns;
    const uint64_t key = dropout.key();

    Accumulator g[kSide * kSide];  // [out, in] each
    pipelined(
        ceil_divide(dy.rows, kDepth),
        [&](int step, int buffer) {
            for (int i = 0; i < kSide; ++i) {
                const int row = (out_tile + i) * kEdge, column = (in_tile + i) * kEdge;
                load_operand<true>(operand[buffer][i], dy, row, step * kDepth);
                load_operand<true>(operand[buffer][kSide + i], x, column, step * kDepth);
            }
        },
        [&](int buffer) {
#pragma unroll
            for (int i = 0; i < kSide * kSide; ++i) {
                multiply<true, true>(g[i], operand[buffer][i / kSide], operand[buffer][kSide + i % kSide]);
            }
        });

#pragma unroll 1
    for (int tile = 0; tile < kSide * kSide; ++tile) {
        const int row = (out_tile + tile / kSide) * kEdge, column = (in_tile + tile % kSide) * kEdge;
        if (row >= n_out || column >= n_in) continue;
#pragma unroll
        for (int i = 0; i < kSide * kSide; ++i) {  // a constant index, or g would leave the registers
            if (i == tile) g[i].store(shared.stage[0]);
        }
        Accumulator s;
        rank_k(s, operand[1], b, h, row, column);
        __syncthreads();  // the factors' room is free
        s.store(shared.stage[1]);
        __syncthreads();  // g and s are there
        for_each_four([&](int r, int c) {
            const Four keep = keep_factors(dropout, key, column + c, row + r, n_out);
            for (int e = 0; e < 4; ++e) {
                const float g_element = shared.stage[0].at(r + e, c), s_element = shared.stage[1].at(r + e, c);
                shared.p.value[(r + e) * kRow<T, kEdge> + c] =
                    T(scale * g_element * slope(s_element, activation) * keep.value[e]);
            }
        });
        for (int unit = 0; unit < k; unit += kEdge) {
            __syncthreads();  // P is there, all else is free
            load_operand<true>(operand[0][0], h, unit, column);
            load_operand<true>(operand[0][1], b, unit, row);
            commit_copies();
            wait_for_copies<0>();
            __syncthreads();  // h and b are there
            if (dbs != nullptr) {
                Accumulator db;  // [out, unit]
                multiply<false, true>(db, shared.p, operand[0][0], kDepth, k - unit);
                db.for_each([&](int r, int c, float element) {
                    if (row + r >= n_out || unit + c >= k) return;
                    write(dbs + (static_cast<int64_t>(column / kEdge) * n_out + row + r) * k + unit + c, element);
                });
            }
            if (dhs != nullptr) {
                Accumulator dh;  // [in, unit]
                multiply<true, true>(dh, shared.p, operand[0][1], kDepth, k - unit);
                dh.for_each([&](int r, int c, float element) {
                    if (column + r >= n_in || unit + c >= k) return;
                    write(dhs + (static_cast<int64_t>(row / kEdge) * n_in + column + r) * k + unit + c, element);
                });
            }
        }
        __syncthreads();  // all is free
    }
}

}  // namespace

int contract(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* b, const void* h,
             const int64_t* seed, float* dh, float* db, int t, int n_out, int n_in, int k, uint32_t threshold,
             float keep_scale, uint32_t random_stream, float scale, int activation, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto start = [&](auto side) {
            constexpr int kSide = decltype(side)::value, kBlock = kSide * kEdge;
            return launch<ContractShared<T, kSide>>(
                contract_kernel<kSide, T>, dim3(ceil_divide(n_out, kBlock), ceil_divide(n_in, kBlock)), kThreads,
                stream, stored<T>(dy, dy_stride, false, t, n_out), stored<T>(x, x_stride, false, t, n_in),
                stored<T>(b, k, false, n_out, k), stored<T>(h, k, false, n_in, k),
                Dropout{seed, threshold, keep_scale, random_stream}, dh, db, scale, activation);
        };
        if constexpr (sizeof(T) == 2) {  // larger blocks read less, if there are enough of them for a large card
            constexpr int kEnough = 128;
            if (static_cast<int64_t>(ceil_divide(n_out, 2 * kEdge)) * ceil_divide(n_in, 2 * kEdge) >= kEnough) {
                return start(std::integral_constant<int, 2>());
            }
        }
        return start(std::integral_constant<int, 1>());
    });
}

}  // namespace genft
