// Tiles: from global to shared memory, their products in registers, and back.
//
// A block works on square tiles of kEdge rows and columns and sums over slices of kDepth. An operand of a product
// stands in shared memory as [kEdge, kDepth], or, transposed, as [kDepth, kEdge], whichever way it lies in memory.
#pragma once

#include "device.cuh"

namespace genft {

constexpr int kEdge = 64;      // of a tile
constexpr int kDepth = 64;     // of a slice of the sum
constexpr int kUnits = 16;     // hidden units come in slices of a matrix instruction
constexpr int kThreads = 128;  // of a block: four warps, each with 16 rows of a tile
constexpr int kGroups = kEdge / 8;  // of 8 columns, as a matrix instruction takes them

__host__ __device__ constexpr int ceil_divide(int a, int b) { return (a + b - 1) / b; }

// Element (r, c) of a matrix in global memory lies at data[r * stride + c].
template <class T>
struct Matrix {
    const T* data;
    int64_t stride;
    int rows, columns;
};

// The matrix [rows, columns], or, if it lies in memory as its transpose, that one.
template <class T>
Matrix<T> stored(const void* data, int64_t stride, bool transposed, int rows, int columns) {
    return {static_cast<const T*>(data), stride, transposed ? columns : rows, transposed ? rows : columns};
}

// Layer `layer` of a contiguous stack [layers, rows, columns].
template <class T>
__host__ __device__ Matrix<T> of_stack(const T* stack, int layer, int rows, int columns) {
    return {stack + static_cast<int64_t>(layer) * rows * columns, columns, rows, columns};
}

// --- shared memory --------------------------------------------------------------------------------------------------

// Distance between rows of a tile: 16 bytes are added, so that eight rows in a column meet all banks.
template <class T>
constexpr int kPad = 16 / sizeof(T);
template <class T, int kColumns>
constexpr int kRow = kColumns + kPad<T>;

// Room for an operand either way round.
template <class T>
struct alignas(16) Operand {
    T value[kEdge * kRow<T, kDepth>];
    static_assert(kEdge * kRow<T, kDepth> >= kDepth * kRow<T, kEdge>);
};

// Room for a product in float32, [kEdge, kEdge].
struct alignas(16) Stage {
    float value[kEdge * kRow<float, kEdge>];
    __device__ float& at(int row, int column) { return value[row * kRow<float, kEdge> + column]; }
};

// Two slices of two operands: while one is used, the next is on its way. A product in float32 fits into the whole.
template <class T>
union Buffers {
    Operand<T> operand[2][2];
    Stage stage;
};

// Starts to copy rows from `row` and columns from `column` on into a tile [kRows, kColumns], zero outside the matrix.
// What is not a whole aligned chunk of 16 bytes is copied by elements.
template <int kRows, int kColumns, class T>
__device__ __forceinline__ void load_tile(T* tile, const Matrix<T>& matrix, int row, int column) {
    constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
    const bool aligned = (reinterpret_cast<uintptr_t>(matrix.data) | matrix.stride * sizeof(T)) % 16 == 0;
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int r = i / kChunks, c = i % kChunks * kChunk;
        const int inside = row + r < matrix.rows ? matrix.columns - column - c : 0;  // elements of this chunk
        const T* from = matrix.data + (row + r) * matrix.stride + column + c;
        T* to = tile + r * kRow<T, kColumns> + c;
        if (aligned && inside >= kChunk) {
            copy_16_bytes_async(to, from);
        } else {
            for (int e = 0; e < kChunk; ++e) to[e] = e < inside ? read(from + e) : T(0.0f);
        }
    }
}

// A tile [kEdge, kEdge] to a contiguous matrix [rows, columns], what is inside it.
template <class T>
__device__ __forceinline__ void store_tile(T* matrix, int rows, int columns, const T* tile, int row, int column) {
    constexpr int kChunk = 16 / sizeof(T), kChunks = kEdge / kChunk;
    const bool aligned = (reinterpret_cast<uintptr_t>(matrix) | columns * sizeof(T)) % 16 == 0;
    for (int i = threadIdx.x; i < kEdge * kChunks; i += kThreads) {
        const int r = i / kChunks, c = i % kChunks * kChunk;
        if (row + r >= rows) continue;
        const T* from = tile + r * kRow<T, kEdge> + c;
        T* to = matrix + static_cast<int64_t>(row + r) * columns + column + c;
        const int inside = columns - column - c;
        if (aligned && inside >= kChunk) {
            write_16_bytes(to, from);
        } else {
            for (int e = 0; e < kChunk && e < inside; ++e) write(to + e, from[e]);
        }
    }
}

// An operand's rows from `row` on and its slice of the sum from `depth` on.
template <bool kTransposed, class T>
__device__ __forceinline__ void load_operand(Operand<T>& operand, const Matrix<T>& matrix, int row, int depth) {
    if constexpr (kTransposed) {
        load_tile<kDepth, kEdge>(operand.value, matrix, depth, row);
    } else {
        load_tile<kEdge, kDepth>(operand.value, matrix, row, depth);
    }
}

// --- registers ------------------------------------------------------------------------------------------------------

// A thread's part of a tile, laid out as multiply_matrices has it.
struct Accumulator {
    float value[kGroups][4] = {};

    // First row of this thread's warp.
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 16; }

    // f(row, column, value) for every element of this thread.
    template <class F>
    __device__ __forceinline__ void for_each(F f) {
        const int row = warp_row() + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) f(row + e / 2 * 8, column + n * 8 + e % 2, value[n][e]);
        }
    }

    __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i) value[i / 4][i % 4] += other.value[i / 4][i % 4];
    }

    __device__ __forceinline__ void store(Stage& stage) {
        for_each([&](int row, int column, float element) { stage.at(row, column) = element; });
    }
};

// total [rows, columns] += a [rows, depth] b[columns, depth]^T; depth is a multiple of 16. Columns from `columns` on
// are not wanted.
template <bool kATransposed, bool kBTransposed, class T>
__device__ __forceinline__ void multiply(Accumulator& total, const Operand<T>& a_operand, const Operand<T>& b_operand,
                                         int depth = kDepth, int columns = kEdge) {
    const T *a = a_operand.value, *b = b_operand.value;
    const int first_row = total.warp_row(), lane = threadIdx.x % 32;
    const auto a_at = [&](int row, int d) {
        return a + (kATransposed ? d * kRow<T, kEdge> + row : row * kRow<T, kDepth> + d);
    };
    const auto b_at = [&](int column, int d) {
        return b + (kBTransposed ? d * kRow<T, kEdge> + column : column * kRow<T, kDepth> + d);
    };
    if constexpr (sizeof(T) == 4) {  // float32: exact products; a slice is summed apart, so that long sums stay exact
        Accumulator slice;
        const int row = first_row + lane / 4, column = lane % 4 * 2;
#pragma unroll 1
        for (int d = 0; d < depth; ++d) {
            float left[2], right[kGroups][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) left[i] = *a_at(row + i * 8, d);
#pragma unroll
            for (int i = 0; i < kGroups * 2; ++i) right[i / 2][i % 2] = *b_at(column + i / 2 * 8 + i % 2, d);
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) slice.value[n][e] += left[e / 2] * right[n][e % 2];
            }
        }
        total.add(slice);
    } else {
        const int matrix = lane / 8, j = lane % 8;  // this lane addresses row j of the matrix
        for (int d = 0; d < depth; d += 16) {
            uint32_t left[4];  // matrices: rows 0 and 8 at depth 0, then at depth 8
            const int row = first_row + matrix % 2 * 8, at = d + matrix / 2 * 8;
            load_matrices<kATransposed>(left, kATransposed ? a_at(row, at + j) : a_at(row + j, at));
#pragma unroll
            for (int n = 0; n < kGroups; n += 2) {  // matrices: columns 0 at depth 0 and 8, then columns 8
                if (n * 8 >= columns) continue;
                uint32_t right[4];
                const int column = n * 8 + matrix / 2 * 8, at = d + matrix % 2 * 8;
                load_matrices<kBTransposed>(right, kBTransposed ? b_at(column, at + j) : b_at(column + j, at));
                multiply_matrices<T>(total.value[n], left, right[0], right[1]);
                multiply_matrices<T>(total.value[n + 1], left, right[2], right[3]);
            }
        }
    }
}

// --- loops ----------------------------------------------------------------------------------------------------------

// load(step, buffer) starts to fill one of two buffers, use(buffer) works on it; the next fill is under way meanwhile.
// Afterwards the buffers are free.
template <class Load, class Use>
__device__ __forceinline__ void pipelined(int steps, Load load, Use use) {
    if (steps > 0) load(0, 0);
    commit_copies();
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) load(step + 1, (step + 1) % 2);
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();  // this step's buffer is full
        use(step % 2);
        __syncthreads();  // and free again
    }
}

// total += left [rows, k] right[columns, k]^T at (row, column); the room of two operands must be free, and is still in
// use by other threads afterwards.
template <bool kLeftTransposed = false, class T>
__device__ __forceinline__ void rank_k(Accumulator& total, Operand<T>* operand, const Matrix<T>& left,
                                       const Matrix<T>& right, int row, int column) {
    const int k = right.columns;
    for (int unit = 0; unit < k; unit += kDepth) {
        if (unit > 0) __syncthreads();  // the operands are free again
        load_operand<kLeftTransposed>(operand[0], left, row, unit);
        load_operand<false>(operand[1], right, column, unit);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();  // the operands are there
        const int depth = min(kDepth, ceil_divide(k - unit, kUnits) * kUnits);
        multiply<kLeftTransposed, false>(total, operand[0], operand[1], depth);
    }
}

// f(row, column) for every element of a tile, neighbours along a row by neighbouring threads.
template <class F>
__device__ __forceinline__ void for_each_element(F f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kEdge * kEdge; i += kThreads) f(i / kEdge, i % kEdge);
}

}  // namespace genft
