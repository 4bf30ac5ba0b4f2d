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

// G is linear in the tokens, so each split has its own. Partial sums, added up afterwards in a fixed order:
// dbs [split, in tile, out, k], dhs [split, out tile, in, k].
template <int kSide, class T>
__global__ void __launch_bounds__(kThreads)
    contract_kernel(Matrix<T> dy, Matrix<T> x, int per_split, Matrix<T> b, Matrix<T> h, Dropout dropout, float* dhs,
                    float* dbs, float scale, int activation) {
    auto& shared = shared_memory<ContractShared<T, kSide>>();
    auto& operand = shared.operand;
    const int out_tile = blockIdx.x * kSide, in_tile = blockIdx.y * kSide;  // the first ones of this block
    const int n_out = b.rows, n_in = h.rows, k = b.columns;
    const int first = blockIdx.z * per_split;
    const uint64_t key = dropout.key();

    Accumulator g[kSide * kSide];  // [out, in] each
    pipelined(
        ceil_divide(min(per_split, dy.rows - first), kDepth),
        [&](int step, int buffer) {
            const int depth = first + step * kDepth;
            for (int i = 0; i < kSide; ++i) {
                const int row = (out_tile + i) * kEdge, column = (in_tile + i) * kEdge;
                load_operand<true>(operand[buffer][i], dy, row, depth);
                load_operand<true>(operand[buffer][kSide + i], x, column, depth);
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
                    const int64_t part = blockIdx.z * ceil_divide(n_in, kEdge) + column / kEdge;
                    write(dbs + (part * n_out + row + r) * k + unit + c, element);
                });
            }
            if (dhs != nullptr) {
                Accumulator dh;  // [in, unit]
                multiply<true, true>(dh, shared.p, operand[0][1], kDepth, k - unit);
                dh.for_each([&](int r, int c, float element) {
                    if (column + r >= n_in || unit + c >= k) return;
                    const int64_t part = blockIdx.z * ceil_divide(n_out, kEdge) + row / kEdge;
                    write(dhs + (part * n_in + column + r) * k + unit + c, element);
                });
            }
        }
        __syncthreads();  // all is free
    }
}

}  // namespace

int contract(const Tokens& tokens, const Update& update, float scale, float* dh, float* db, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int n_out = update.n_out, n_in = update.n_in, k = update.k;
        const int splits = tokens.count > tokens.per_split ? ceil_divide(tokens.count, tokens.per_split) : 1;
        const auto start = [&](auto side) {
            constexpr int kSide = decltype(side)::value, kBlock = kSide * kEdge;
            return launch<ContractShared<T, kSide>>(
                contract_kernel<kSide, T>, dim3(ceil_divide(n_out, kBlock), ceil_divide(n_in, kBlock), splits),
                kThreads, stream, stored<T>(tokens.dy, tokens.dy_stride, false, tokens.count, n_out),
                stored<T>(tokens.x, tokens.x_stride, false, tokens.count, n_in), tokens.per_split,
                stored<T>(update.left, k, false, n_out, k), stored<T>(update.right, k, false, n_in, k),
                dropout_of(update), dh, db, scale, update.activation);
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
