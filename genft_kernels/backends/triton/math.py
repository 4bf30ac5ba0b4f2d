"""Functions of all Triton kernels: activations and their slopes, the tile of an update, masks, stochastic rounding.

Tiles stand in the weight's orientation, [out, in]; the hidden dimension k is gone through in slices of 16, so that
37 hidden units cost 48, not 64.
"""

import triton
import triton.language as tl

SLICE = 16


@triton.jit
def _tanh(z):
    """tanh of z, float32, to a few units in the last place; near zero 1 - 2 / (exp + 1) would cancel."""
    s = z * z
    # The polynomial of degree 4 with the least relative error of z + z s p(s) for |z| < 0.625.
    p = -0.33333281 + s * (0.13331442 + s * (-0.053739697 + s * (0.020639038 + s * -0.0057049356)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.625, z + z * s * p, tl.where(z < 0, -far, far))


@triton.jit
def activate(z, NAME: tl.constexpr):
    """phi or psi of z, float32."""
    if NAME == "relu":
        return tl.where(z < 0, 0.0, z)  # so that NaN stays NaN
    elif NAME == "leaky_relu":
        return tl.where(z < 0, 0.01 * z, z)
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    elif NAME == "tanh":
        return _tanh(z)
    else:
        return z


@triton.jit
def activation_slope(z, NAME: tl.constexpr):
    """The derivative at z, float32."""
    if NAME == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        return tl.where(z > 0, 1.0, 0.01)
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif NAME == "silu":
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif NAME == "tanh":
        value = _tanh(z)
        return 1.0 - value * value
    else:
        return z * 0.0 + 1.0


@triton.jit
def tile_of_program(row_tiles, column_tiles):
    """(row tile, column tile) of a program, so that programs that run together share what they read from memory."""
    program = tl.program_id(0)
    return tl.swizzle2d(program // column_tiles, program % column_tiles, row_tiles, column_tiles, 8)


@triton.jit
def key_of_layer(seeds, layer):
    """The layer's Philox key, int64; no seeds are seeds of zero."""
    if seeds is None:
        return tl.full((), 0, tl.int64)
    else:
        return tl.load(seeds + layer)


@triton.jit
def thin_rows(thin, rows, units, n_rows, n_units):
    """Rows of a contiguous thin matrix [n_rows, n_units], zero outside it: [rows, units]."""
    mask = (rows[:, None] < n_rows) & (units[None, :] < n_units)
    return tl.load(thin + rows[:, None].to(tl.int64) * n_units + units[None, :], mask=mask, other=0.0)


@triton.jit
def matrix_tile(matrix, rows, columns, n_rows, n_columns, stride_row, stride_column):
    mask = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(matrix + at, mask=mask, other=0.0)


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left right, float32, of a sum over many tiles.

    In float32 a thread adds one product after the other. Each tile is summed by itself first: over 500 products that
    is half the error of one chain.
    """
    if PRECISION == "ieee":
        # As an addition, Triton would fuse it into the product.
        return tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, total)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def rank_k_tile(left, right, rows, columns, n_rows, n_columns, k, SLICES: tl.constexpr, PRECISION: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, LEFT_TRANSPOSED: tl.constexpr = False):  # fmt: skip
    """left [n_rows, k] right[n_columns, k]^T at (rows, columns), float32; `left` lies as it is or transposed."""
    tile = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for index in tl.static_range(SLICES):
        units = index * 16 + tl.arange(0, 16)
        if LEFT_TRANSPOSED:
            a = matrix_tile(left, rows, units, n_rows, k, 1, n_rows)
        else:
            a = thin_rows(left, rows, units, n_rows, k)
        b = thin_rows(right, columns, units, n_columns, k)
        tile = tl.dot(a, tl.trans(b), tile, input_precision=PRECISION)
    return tile


@triton.jit
def word_tile(seed, stream, rows, columns, n_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The Philox word of each element of an update, uint32 [rows (out), columns (in)] (docs/method.md#random-numbers).

    Four neighbours along out share a counter, so a quarter of the counters is drawn and the words are laid out.
    `rows` must start at a multiple of 4.
    """
    first = tl.min(rows, 0) // 4 + tl.arange(0, BLOCK_R // 4)  # j // 4
    blocks = (n_rows + 3) // 4
    q = columns[None, :].to(tl.int64) * blocks + first[:, None]  # [rows / 4, columns]
    low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + stream, zero)
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [rows / 4, columns, 2, 2]: word 2 a + b at [..., a, b]
    words = tl.permute(pairs, (0, 2, 3, 1))
    return tl.reshape(words, (BLOCK_R, BLOCK_C))


@triton.jit
def keep_tile(seed, stream, rows, columns, n_rows, threshold, keep_scale, BLOCK_R: tl.constexpr,
              BLOCK_C: tl.constexpr):  # fmt: skip
    """0 or 1 / (1 - p) for each element of an update, float32 [rows, columns]."""
    words = word_tile(seed, stream, rows, columns, n_rows, BLOCK_R, BLOCK_C)
    return tl.where(words >= tl.cast(threshold, tl.uint32), keep_scale, 0.0)


@triton.jit
def update_tile(
    b, h, key, rows, columns, n_out, n_in, k, threshold, keep_scale, stream,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """drop(psi(b h^T)) at (rows of out, columns of in), float32."""
    s = rank_k_tile(b, h, rows, columns, n_out, n_in, k, SLICES, PRECISION, BLOCK_OUT, BLOCK_IN)
    update = activate(s, ACTIVATION)
    if DROPOUT:
        update *= keep_tile(key, stream, rows, columns, n_out, threshold, keep_scale, BLOCK_OUT, BLOCK_IN)
    return update


@triton.jit
def round_up_or_down(exact, words, BITS: tl.constexpr):
    """Stochastic rounding of float32 to the mantissa that lacks BITS; NaN and infinities stay what they are."""
    bits = exact.to(tl.uint32, bitcast=True)
    rounded = (bits + (words >> (32 - BITS))) & (0xFFFFFFFF << BITS & 0xFFFFFFFF)
    return tl.where(tl.abs(exact) < float("inf"), rounded.to(tl.float32, bitcast=True), exact)
