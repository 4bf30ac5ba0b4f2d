// The row stage in its tiled form, flash style: h = inner(Y^T A^T + a), Y = drop(outer(left right^T)) never stored.
//
// Tiles of Y stand as [out, in]. A is `down` [k, out]; the sum over out or in is cut into tiles of the update's edge.
#include "update.cuh"

namespace genft {
namespace {

static_assert(kEdge == kDepth, "a tile of the update is a slice of the products that follow");

template <class T>
struct Row {
    const T *lefts, *rights, *downs, *dzs;  // a matrix for each layer
    Dropout dropout;
    int n_out, n_in, k1, k, outer;

    __device__ Matrix<T> left(int layer) const { return of_stack(lefts, layer, n_out, k1); }
    __device__ Matrix<T> right(int layer) const { return of_stack(rights, layer, n_in, k1); }
    __device__ Matrix<T> down(int layer) const { return of_stack(downs, layer, k, n_out); }
    __device__ Matrix<T> dz(int layer) const { return of_stack(dzs, layer, n_in, k); }
};

template <class T>
struct RowShared {
    Operand<T> operand[2];
    union {
        Stage stage[2];
        Operand<T> late[2];  // once the stages' values are used up
    };
};

// h [in, k] = inner(Y^T A^T + a): a block has its columns of Y and some units.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_forward_kernel(Row<T> given, Outcome outcome) {
    const int n_out = given.n_out, n_in = given.n_in, k = given.k;
    auto& shared = shared_memory<RowShared<T>>();
    const int column = blockIdx.x * kEdge, unit = blockIdx.y * kEdge, layer = blockIdx.z;
    const uint64_t key = given.dropout.key(layer);

    Accumulator z;  // [in, unit]
    for (int row = 0; row < n_out; row += kEdge) {
        Accumulator s;  // [out, in]
        rank_k(s, shared.operand, given.left(layer), given.right(layer), row, column);
        s.store(shared.stage[0]);
        __syncthreads();  // s is there, the operands are free
        load_operand<false>(shared.operand[1], given.down(layer), unit, row);
        for_each_four([&](int r, int c) {
            const Four keep = keep_factors(given.dropout, key, column + c, row + r, n_out);
            for (int e = 0; e < 4; ++e) {
                const float y = activate(shared.stage[0].at(r + e, c), given.outer) * keep.value[e];
                shared.operand[0].value[(r + e) * kRow<T, kEdge> + c] = T(y);
            }
        });
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();  // Y and A are there
        multiply<true, false>(z, shared.operand[0], shared.operand[1], kDepth, k - unit);
        __syncthreads();  // the operands are free
    }

    z.store(shared.stage[0]);
    __syncthreads();
    for_each_element([&](int r, int c) {
        if (column + r >= n_in || unit + c >= k) return;
        const int64_t at = (static_cast<int64_t>(layer) * n_in + column + r) * k + unit + c;
        finish(static_cast<T*>(outcome.out), static_cast<T*>(outcome.pre), static_cast<const T*>(outcome.bias), at,
               unit + c, shared.stage[0].at(r, c), outcome.activation);
    });
}

// Tiles of Y and of Q = dY * mask * outer'(left right^T), dY = (dZ A)^T, both [out, in], to operands 0 and 1. The
// stages are free afterwards.
template <class T>
__device__ __forceinline__ void row_tiles(RowShared<T>& shared, const Row<T>& given, uint64_t key, int layer, int row,
                                          int column) {
    Accumulator s, dy;
    rank_k(s, shared.operand, given.left(layer), given.right(layer), row, column);
    s.store(shared.stage[0]);
    __syncthreads();  // the operands are free
    rank_k<true>(dy, shared.operand, given.down(layer), given.dz(layer), row, column);
    dy.store(shared.stage[1]);
    __syncthreads();  // s and dy are there, the operands are free
    for_each_four([&](int r, int c) {
        const Four keep = keep_factors(given.dropout, key, column + c, row + r, given.n_out);
        for (int e = 0; e < 4; ++e) {
            const float argument = shared.stage[0].at(r + e, c), grad = shared.stage[1].at(r + e, c);
            const int at = (r + e) * kRow<T, kEdge> + c;
            shared.operand[0].value[at] = T(activate(argument, given.outer) * keep.value[e]);
            shared.operand[1].value[at] = T(grad * slope(argument, given.outer) * keep.value[e]);
        }
    });
    __syncthreads();  // Y and Q are there, the stages are free
}

// dleft [out, k1] = Q right and dA [k, out] = (Y dZ)^T: a block has its rows of both.
template <class T>
__global__ void __launch_bounds__(kThreads) row_backward_out_kernel(Row<T> given, T* dlefts, T* ddowns) {
    const int n_out = given.n_out, n_in = given.n_in, k1 = given.k1, k = given.k;
    auto& shared = shared_memory<RowShared<T>>();
    const int row = blockIdx.x * kEdge, unit = blockIdx.y * kEdge, layer = blockIdx.z;
    const uint64_t key = given.dropout.key(layer);

    Accumulator dleft, ddown;  // [out, unit]
    for (int column = 0; column < n_in; column += kEdge) {
        row_tiles(shared, given, key, layer, row, column);
        load_operand<true>(shared.late[0], given.right(layer), unit, column);
        load_operand<true>(shared.late[1], given.dz(layer), unit, column);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();  // right and dZ are there
        multiply<false, true>(dleft, shared.operand[1], shared.late[0], kDepth, k1 - unit);
        multiply<false, true>(ddown, shared.operand[0], shared.late[1], kDepth, k - unit);
        __syncthreads();  // all is free
    }

    dleft.store(shared.stage[0]);
    ddown.store(shared.stage[1]);
    __syncthreads();
    if (dlefts != nullptr) {
        for_each_element([&](int r, int c) {
            if (row + r >= n_out || unit + c >= k1) return;
            const int64_t at = (static_cast<int64_t>(layer) * n_out + row + r) * k1 + unit + c;
            write(dlefts + at, T(shared.stage[0].at(r, c)));
        });
    }
    if (ddowns != nullptr) {
        for_each_element([&](int c, int r) {
            if (row + r >= n_out || unit + c >= k) return;
            const int64_t at = (static_cast<int64_t>(layer) * k + unit + c) * n_out + row + r;
            write(ddowns + at, T(shared.stage[1].at(r, c)));
        });
    }
}

// dright [in, k1] = Q^T left: a block has its columns of Q.
template <class T>
__global__ void __launch_bounds__(kThreads) row_backward_in_kernel(Row<T> given, T* drights) {
    const int n_out = given.n_out, n_in = given.n_in, k1 = given.k1;
    auto& shared = shared_memory<RowShared<T>>();
    const int column = blockIdx.x * kEdge, unit = blockIdx.y * kEdge, layer = blockIdx.z;
    const uint64_t key = given.dropout.key(layer);

    Accumulator dright;  // [in, unit]
    for (int row = 0; row < n_out; row += kEdge) {
        row_tiles(shared, given, key, layer, row, column);
        load_operand<true>(shared.late[0], given.left(layer), unit, row);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();  // left is there
        multiply<true, true>(dright, shared.operand[1], shared.late[0], kDepth, k1 - unit);
        __syncthreads();  // all is free
    }

    dright.store(shared.stage[0]);
    __syncthreads();
    for_each_element([&](int r, int c) {
        if (column + r >= n_in || unit + c >= k1) return;
        const int64_t at = (static_cast<int64_t>(layer) * n_in + column + r) * k1 + unit + c;
        write(drights + at, T(shared.stage[0].at(r, c)));
    });
}

template <class T>
Row<T> row_of(const Update& y, const void* down, const void* dz, int k) {
    return {static_cast<const T*>(y.left), static_cast<const T*>(y.right), static_cast<const T*>(down),
            static_cast<const T*>(dz),     dropout_of(y),                  y.n_out,
            y.n_in,                        y.k,                            k,
            y.activation};
}

}  // namespace

int row_forward(const Update& y, const void* down, int k, const Outcome& outcome, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const dim3 grid(ceil_divide(y.n_in, kEdge), ceil_divide(k, kEdge), y.layers);
        return launch<RowShared<T>>(row_forward_kernel<T>, grid, kThreads, stream, row_of<T>(y, down, nullptr, k),
                                    outcome);
    });
}

int row_backward_out(const Update& y, const void* down, const void* dz, int k, void* dleft, void* ddown, int dtype,
                     void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const dim3 grid(ceil_divide(y.n_out, kEdge), ceil_divide(k > y.k ? k : y.k, kEdge), y.layers);
        return launch<RowShared<T>>(row_backward_out_kernel<T>, grid, kThreads, stream, row_of<T>(y, down, dz, k),
                                    static_cast<T*>(dleft), static_cast<T*>(ddown));
    });
}

int row_backward_in(const Update& y, const void* down, const void* dz, int k, void* dright, int dtype, void* stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const dim3 grid(ceil_divide(y.n_in, kEdge), ceil_divide(y.k, kEdge), y.layers);
        return launch<RowShared<T>>(row_backward_in_kernel<T>, grid, kThreads, stream, row_of<T>(y, down, dz, k),
                                    static_cast<T*>(dright));
    });
}

}  // namespace genft
