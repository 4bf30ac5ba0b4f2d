// The launchers of GenFT's kernels: raw pointers in, an error code out; neither torch nor CUDA headers.
//
// Each one starts its kernels on `stream` (a cudaStream_t) and returns a cudaError_t as int, 0 if all were started.
// Pointers are device pointers, but for the lists of matrices. Everything is of dtype `dtype`, row-major and
// contiguous, unless said otherwise; [layers, ...] are stacks. `stride` is the distance, in elements, from one row of
// a matrix to the next; of a `transposed` one, from column to column: it lies in memory as its transpose.
// k, k1 are numbers of hidden units. The formulas are those of docs/method.md#two-products.
#pragma once

#include <cstdint>

namespace genft {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kGelu = 3, kSilu = 4, kTanh = 5 };

const char* error_string(int code);

// out [layers, m, k] = activation(matrix_l [m, n] thin_l[k, n]^T + bias [k]).
// matrices: host list of `layers` device pointers. bias may be null; pre [layers, m, k] gets the activation's
// argument and is null for the identity.
int thin_product(const void* const* matrices, int64_t stride, bool transposed, const void* thin, const void* bias,
                 void* out, void* pre, int layers, int m, int n, int k, int activation, int dtype, void* stream);

// out float32 [layers, splits, k, n] = thin_l[m, k]^T matrix_l [m, n], each split over its own `rows_per_split` rows (a
// multiple of 64). The sum over splits is left to the caller.
int thin_transposed(const void* thin, const void* const* matrices, int64_t stride, bool transposed, float* out,
                    int layers, int m, int n, int k, int rows_per_split, int dtype, void* stream);

// h [layers, n_in, k] = inner(Y^T down^T + bias), Y = drop(outer(left right^T)) [n_out, n_in], never stored.
// left [layers, n_out, k1], right [layers, n_in, k1], down [layers, k, n_out], bias [k] or null, seed int64 [layers] or
// null; threshold = floor(p 2^32), 0 without dropout; keep_scale = 1 / (1 - p). pre as above.
int row_forward(const void* left, const void* right, const void* down, const void* bias, const int64_t* seed, void* h,
                void* pre, int layers, int n_out, int n_in, int k1, int k, uint32_t threshold, float keep_scale,
                int outer, int inner, int dtype, void* stream);

// With Q = dY * mask * outer'(left right^T), dY = (dz down)^T, dz [layers, n_in, k] the gradient before `inner`:
// dleft [layers, n_out, k1] = Q right, ddown [layers, k, n_out] = (Y dz)^T.
int row_backward_out(const void* left, const void* right, const void* down, const void* dz, const int64_t* seed,
                     void* dleft, void* ddown, int layers, int n_out, int n_in, int k1, int k, uint32_t threshold,
                     float keep_scale, int outer, int dtype, void* stream);

// dright [layers, n_in, k1] = Q^T left.
int row_backward_in(const void* left, const void* right, const void* down, const void* dz, const int64_t* seed,
                    void* dright, int layers, int n_out, int n_in, int k1, int k, uint32_t threshold, float keep_scale,
                    int outer, int dtype, void* stream);

// With U = drop(activation(b h^T)) [n_out, n_in], b [n_out, k], h [n_in, k]; seed int64 [1] or null; random_stream is
// Philox's (philox.h):
// out [n_out, n_in] = W + scale U, rounded stochastically to 16 bits by the words of the rounding stream.
int fold(const void* weight, int64_t stride, bool transposed, const void* b, const void* h, const int64_t* seed,
         void* out, int n_out, int n_in, int k, uint32_t threshold, float keep_scale, uint32_t random_stream,
         float scale, int activation, int dtype, void* stream);

// With P = scale * (dy^T x) * mask * activation'(b h^T) [n_out, n_in], tile by tile and never stored:
// db float32 [ceil(n_in / 64), n_out, k] = P h and dh float32 [ceil(n_out / 64), n_in, k] = P^T b, a part for each
// tile; their sum is left to the caller. Either may be null. dy [t, n_out], x [t, n_in].
int contract(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* b, const void* h,
             const int64_t* seed, float* dh, float* db, int t, int n_out, int n_in, int k, uint32_t threshold,
             float keep_scale, uint32_t random_stream, float scale, int activation, int dtype, void* stream);

}  // namespace genft
