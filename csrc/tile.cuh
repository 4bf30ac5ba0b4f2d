// Tiles: from global to shared memory, their products in registers, and back.
//
// A block works on a square tile of kTile rows and columns and sums over slices of kDepth. An operand of a product
// stands in shared memory as [kTile, kDepth], or, transposed, as [kDepth, kTile], whichever way it lies in memory.
#pragma once

#include "device.cuh"

namespace genft {

constexpr int kEdge = 64;   // of the tile of an update
constexpr int kDepth = 64;  // of a slice of the sum
constexpr int kUnits = 16;  // hidden units come in slices of a matrix instruction

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
template <class T, int kTile = kEdge>
struct alignas(16) Operand {
    T value[kTile * kRow<T, kDepth>];
    static_assert(kTile * kRow<T, kDepth> >= kDepth * kRow<T, kTile>);
};

// Room for a product in float32, [kTile, kTile].
template <int kTile = kEdge>
struct alignas(16) Stage {
    float value[kTile * kRow<float, kTile>];
    __device__ float& at(int row, int column) { return value[row * kRow<float, kTile> + column]; }
};

// Two slices of two operands: while one is used, the next is on its way. A product in float32 fits into the whole.
template <class T, int kTile = kEdge>
union Buffers {
    Operand<T, kTile> operand[2][2];
    Stage<kTile> stage;
};

// Starts to copy rows from `row` and columns from `column` on into a tile [kRows, kColumns], zero outside the matrix.
// What is not a whole aligned chunk of 16 bytes is copied by elements.
template <int kRows, int kColumns, int kThreads, class T>
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
template <int kThreads, class T>
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
template <bool kTransposed, int kTile, int kThreads, class T>
__device__ __forceinline__ void load_operand(Operand<T, kTile>& operand, const Matrix<T>& matrix, int row, int depth) {
    if constexpr (kTransposed) {
        load_tile<kDepth, kTile, kThreads>(operand.value, matrix, depth, row);
    } else {
        load_tile<kTile, kDepth, kThreads>(operand.value, matrix, row, depth);
    }
}

// --- registers ------------------------------------------------------------------------------------------------------

// How the warps of a block share its tile: each has kRows x 16 rows and kColumns x 8 columns.
template <int kTile>
struct Warps;
template <>
struct Warps<64> {
    static constexpr int kThreads = 128, kRows = 1, kColumns = 8, kAcross = 1;
};
template <>
struct Warps<128> {
    static constexpr int kThreads = 256, kRows = 4, kColumns = 4, kAcross = 4;
};

// A thread's part of a tile, laid out as multiply_matrices has it.
template <int kTile = kEdge>
struct Accumulator {
    static constexpr int kRows = Warps<kTile>::kRows, kColumns = Warps<kTile>::kColumns;
    float value[kRows][kColumns][4] = {};

    // First row and column of this thread's warp.
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / Warps<kTile>::kAcross * kRows * 16; }
    static __device__ __forceinline__ int warp_column() {
        return threadIdx.x / 32 % Warps<kTile>::kAcross * kColumns * 8;
    }

    // f(row, column, value) for every element of this thread.
    template <class F>
    __device__ __forceinline__ void for_each(F f) {
        const int row = warp_row() + threadIdx.x % 32 / 4, column = warp_column() + threadIdx.x % 4 * 2;
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) f(row + m * 16 + e / 2 * 8, column + n * 8 + e % 2, value[m][n][e]);
            }
        }
    }

    __device__ __forceinline__ void add(const Accumulator& other) {
#pragma unroll
        for (int i = 0; i < kRows * kColumns * 4; ++i) {
            value[i / 4 / kColumns][i / 4 % kColumns][i % 4] += other.value[i / 4 / kColumns][i / 4 % kColumns][i % 4];
        }
    }

    __device__ __forceinline__ void store(Stage<kTile>& stage) {
        for_each([&](int row, int column, float element) { stage.at(row, column) = element; });
    }
};

// total [rows, columns] += a [rows, depth] b[columns, depth]^T; depth is a multiple of 16. Columns from `columns` on
// are not wanted.
template <bool kATransposed, bool kBTransposed, int kTile, class T>
__device__ __forceinline__ void multiply(Accumulator<kTile>& total, const Operand<T, kTile>& a_operand,
                                         const Operand<T, kTile>& b_operand, int depth = kDepth,
                                         int columns = kTile) {
    constexpr int kRows = Accumulator<kTile>::kRows, kColumns = Accumulator<kTile>::kColumns;
    const T *a = a_operand.value, *b = b_operand.value;
    const int first_row = total.warp_row(), first_column = total.warp_column(), lane = threadIdx.x % 32;
    const auto a_at = [&](int row, int d) {
        return a + (kATransposed ? d * kRow<T, kTile> + row : row * kRow<T, kDepth> + d);
    };
    const auto b_at = [&](int column, int d) {
        return b + (kBTransposed ? d * kRow<T, kTile> + column : column * kRow<T, kDepth> + d);
    };
    if constexpr (sizeof(T) == 4) {  // float32: exact products; a slice is summed apart, so that long sums stay exact
        Accumulator<kTile> slice;
        const int row = first_row + lane / 4, column = first_column + lane % 4 * 2;
#pragma unroll 1
        for (int d = 0; d < depth; ++d) {
            float left[kRows][2], right[kColumns][2];
#pragma unroll
            for (int i = 0; i < kRows * 2; ++i) left[i / 2][i % 2] = *a_at(row + i * 8, d);
#pragma unroll
            for (int i = 0; i < kColumns * 2; ++i) right[i / 2][i % 2] = *b_at(column + i / 2 * 8 + i % 2, d);
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) slice.value[m][n][e] += left[m][e / 2] * right[n][e % 2];
                }
            }
        }
        total.add(slice);
    } else {
        const int matrix = lane / 8, j = lane % 8;  // this lane addresses row j of the matrix
        for (int d = 0; d < depth; d += 16) {
            uint32_t left[kRows][4];
#pragma unroll
            for (int m = 0; m < kRows; ++m) {  // matrices: rows 0 and 8 at depth 0, then at depth 8
                const int row = first_row + m * 16 + matrix % 2 * 8, at = d + matrix / 2 * 8;
                load_matrices<kATransposed>(left[m], kATransposed ? a_at(row, at + j) : a_at(row + j, at));
            }
#pragma unroll
            for (int n = 0; n < kColumns; n += 2) {  // matrices: columns 0 at depth 0 and 8, then columns 8
                if (first_column + n * 8 >= columns) continue;
                uint32_t right[4];
                const int column = first_column + n * 8 + matrix / 2 * 8, at = d + matrix % 2 * 8;
                load_matrices<kBTransposed>(right, kBTransposed ? b_at(column, at + j) : b_at(column + j, at));
#pragma unroll
                for (int m = 0; m < kRows; ++m) {
                    multiply_matrices<T>(total.value[m][n], left[m], right[0], right[1]);
                    multiply_matrices<T>(total.value[m][n + 1], left[m], right[2], right[3]);
                }
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
template <bool kLeftTransposed = false, int kTile, class T>
__device__ __forceinline__ void rank_k(Accumulator<kTile>& total, Operand<T, kTile>* operand, const Matrix<T>& left,
                                       const Matrix<T>& right, int row, int column) {
    constexpr int kThreads = Warps<kTile>::kThreads;
    const int k = right.columns;
    for (int unit = 0; unit < k; unit += kDepth) {
        if (unit > 0) __syncthreads();  // the operands are free again
        load_operand<kLeftTransposed, kTile, kThreads>(operand[0], left, row, unit);
        load_operand<false, kTile, kThreads>(operand[1], right, column, unit);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();  // the operands are there
        const int depth = min(kDepth, ceil_divide(k - unit, kUnits) * kUnits);
        multiply<kLeftTransposed, false>(total, operand[0], operand[1], depth);
    }
}

// f(row, column) for every element of a tile, neighbours along a row by neighbouring threads.
template <int kTile, class F>
__device__ __forceinline__ void for_each_element(F f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * kTile; i += Warps<kTile>::kThreads) f(i / kTile, i % kTile);
}

}  // namespace genft
