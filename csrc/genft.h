// The launchers of GenFT's kernels: raw pointers in, an error code out; neither torch nor CUDA headers.
//
// Each one starts its kernels on `stream` (a cudaStream_t) and returns a cudaError_t as int, 0 if all were started.
// Pointers are device pointers, but for the lists of matrices. Everything is of dtype `dtype`, row-major and
// contiguous, unless said otherwise; [layers, ...] are stacks. k is a number of hidden units. The formulas are those of
// docs/method.md#two-products.
#pragma once

#include <cstdint>

namespace genft {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kGelu = 3, kSilu = 4, kTanh = 5 };

// A big matrix. `stride` is the distance, in elements, from one row to the next; of a `transposed` one, which lies in
// memory as its transpose, from column to column.
struct BigMatrix {
    const void* data;
    int64_t stride;
    bool transposed;
};

// The same, one a layer: `data` is a host list.
struct BigMatrices {
    const void* const* data;
    int64_t stride;
    bool transposed;
    int layers, rows, columns;
};

// U = drop(activation(left right^T)) [n_out, n_in], never stored: left [layers, n_out, k], right [layers, n_in, k],
// seed [layers] or null for seeds of zero.
struct Update {
    const void* left;
    const void* right;
    const int64_t* seed;
    int layers, n_out, n_in, k;
    uint32_t threshold;  // floor(p 2^32), 0 without dropout
    float keep_scale;    // 1 / (1 - p)
    uint32_t stream;     // Philox's (philox.h)
    int activation;
};

// Where activation(z + bias [k]) goes, z [..., k]. bias may be null; pre gets the activation's argument and is null for
// the identity.
struct Outcome {
    void* out;
    const void* bias;
    int activation;
    void* pre;
};

// dy [count, n_out], x [count, n_in]; a stride is the distance of rows. `per_split` is a multiple of 64.
struct Tokens {
    const void* dy;
    int64_t dy_stride;
    const void* x;
    int64_t x_stride;
    int count, per_split;
};

// parts float32 [count, size], added up in their order into `outcome` [size]; or none, if parts is null.
struct Sum {
    const float* parts;
    int count;
    int64_t size;
    Outcome outcome;
};

const char* error_string(int code);

// matrix_l [m, n] thin_l[k, n]^T: where parts is null to outcome [layers, m, k], else a part for each
// `columns_per_split` columns, a multiple of 64, to parts float32 [splits, layers, m, k].
int thin_product(const BigMatrices& matrices, const void* thin, int k, const Outcome& outcome, float* parts,
                 int columns_per_split, int dtype, void* stream);

// thin_l[m, k]^T matrix_l [m, n], likewise: to out [layers, k, n], or a part for each `rows_per_split` rows to parts
// float32 [splits, layers, k, n].
int thin_transposed(const void* thin, const BigMatrices& matrices, int k, void* out, float* parts, int rows_per_split,
                    int dtype, void* stream);

// Y^T down^T to outcome [layers, n_in, k], down [layers, k, n_out].
int row_forward(const Update& y, const void* down, int k, const Outcome& outcome, int dtype, void* stream);

// With Q = dY * mask * activation'(left right^T), dY = (dz down)^T, dz [layers, n_in, k] the gradient before the
// outcome's activation: dleft as left = Q right, ddown as down = (Y dz)^T. Either may be null.
int row_backward_out(const Update& y, const void* down, const void* dz, int k, void* dleft, void* ddown, int dtype,
                     void* stream);

// dright as right = Q^T left.
int row_backward_in(const Update& y, const void* down, const void* dz, int k, void* dright, int dtype, void* stream);

// out [n_out, n_in] = W + scale U, rounded stochastically to 16 bits by the words of the rounding stream; it lies in
// memory as W does, without gaps. One layer.
int fold(const BigMatrix& weight, const Update& update, float scale, void* out, int dtype, void* stream);

// With P = scale * (dy^T x) * mask * activation'(left right^T) [n_out, n_in], tile by tile and never stored, a part for
// each split of the tokens and each tile: db float32 [splits, ceil(n_in / 64), n_out, k] = P right and
// dh float32 [splits, ceil(n_out / 64), n_in, k] = P^T left. Either may be null. One layer.
int contract(const Tokens& tokens, const Update& update, float scale, float* dh, float* db, int dtype, void* stream);

// Two sums in one launch; the second one's outcome has neither bias nor activation. k is the first one's.
int sum_parts(const Sum& first, const Sum& second, int k, int dtype, void* stream);

}  // namespace genft
