"""Faults in the operations: Triton's kernels and the eager backend; its compiled pass is in cpu_faults.py."""

from tests.faults.planting import Fault

BACKENDS = "genft_kernels/backends/"
QUICK = ["-m", "not slow"]
INTERPRETED = [
    "tests/backends/test_backends.py",
    "tests/backends/test_triton.py",
    *QUICK,
    "-k",
    "triton and (square or tall or wide or many) or beyond",
]
GROUPED = ["tests/backends/test_backends.py", *QUICK, "-k", "triton and one_call"]
CPU_PASS = ["tests/backends/test_cpu_pass.py", *QUICK, "-k", "plain or bits"]
EAGER = ["tests/backends/test_backends.py", "tests/ops/test_precision.py", *QUICK, "-k", "eager"]

FAULTS = [
    Fault(
        "philox: counter of the transposed element",
        BACKENDS + "triton/math.py",
        "columns[None, :].to(tl.int64) * blocks + first[:, None]",
        "columns[None, :].to(tl.int64) + first[:, None] * blocks",
        INTERPRETED,
    ),
    Fault(
        "philox: words laid out in another order",
        BACKENDS + "triton/math.py",
        "tl.permute(pairs, (0, 2, 3, 1))",
        "tl.permute(pairs, (0, 3, 2, 1))",
        INTERPRETED,
    ),
    Fault(
        "mask dropped from the thin rows",
        BACKENDS + "triton/math.py",
        "(rows[:, None] < n_rows) & (units[None, :] < n_units)",
        "(rows[:, None] < n_rows)",
        INTERPRETED,
    ),
    Fault(
        "k rounded down to whole slices",
        BACKENDS + "triton/launch.py",
        "ceil_divide(k, SLICE)",
        "max(1, k // SLICE)",
        INTERPRETED,
    ),
    Fault(
        "contraction: dh from the untransposed tile",
        BACKENDS + "triton/contract.py",
        "part = tl.dot(tl.trans(p), right",
        "part = tl.dot(p, right",
        INTERPRETED,
    ),
    Fault(
        "contraction: every split from the first token",
        BACKENDS + "triton/contract.py",
        "split * tokens_per_split + start",
        "start",
        ["tests/backends/test_triton.py", *QUICK, "-k", "triton and split"],
    ),
    Fault(
        "thin product: every split from the first column",
        BACKENDS + "triton/thin.py",
        "split * columns_per_split + start",
        "start",
        ["tests/backends/test_triton.py", *QUICK, "-k", "triton and split"],
    ),
    Fault(
        "sum of parts: all but eight forgotten",
        BACKENDS + "triton/sum.py",
        "range(0, count, 8)",
        "range(0, 8, 8)",
        ["tests/backends/test_triton.py", *QUICK, "-k", "triton and split"],
    ),
    Fault(
        "sum of parts: dh and db exchanged",
        BACKENDS + "triton/sum.py",
        "_sum_of(other_parts, other_outs,",
        "_sum_of(parts, other_outs,",
        ["tests/backends/test_triton.py", *QUICK, "-k", "triton and split"],
    ),
    Fault(
        "factored: a bias of 16 bits before the big product",
        BACKENDS + "eager/factored.py",
        "y.addmm_(tokens, weight.t())",
        "y.add_(0 if bias is None else bias).addmm_(tokens, weight.t()).sub_(0 if bias is None else bias)",
        EAGER,
    ),
    Fault(
        "contraction: slope forgotten",
        BACKENDS + "triton/contract.py",
        "g *= scale * activation_slope(s, ACTIVATION)",
        "g *= scale",
        INTERPRETED,
    ),
    Fault(
        "contraction: dropout forgotten in backward",
        BACKENDS + "triton/contract.py",
        "        g *= keep_tile(",
        "        g += 0 * keep_tile(",
        INTERPRETED,
    ),
    Fault(
        "matrix tile: addresses of 32 bits",
        BACKENDS + "triton/math.py",
        "rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column",
        "rows[:, None] * stride_row + columns[None, :] * stride_column",
        INTERPRETED,
    ),
    Fault(
        "row: every layer draws the first one's mask",
        BACKENDS + "triton/math.py",
        "return tl.load(seeds + layer)",
        "return tl.load(seeds)",
        GROUPED,
    ),
    Fault(
        "thin product: every layer reads the first one's weight",
        BACKENDS + "triton/thin.py",
        "tl.load(offsets + layer)",
        "tl.load(offsets)",
        INTERPRETED,
    ),
    Fault(
        "row: last tile of out not summed",
        BACKENDS + "triton/row.py",
        "n_out, BLOCK_OUT):\n        rows = start + tl.arange(0, BLOCK_OUT)\n        s =",
        "n_out - BLOCK_OUT + 1, BLOCK_OUT):\n        rows = start + tl.arange(0, BLOCK_OUT)\n        s =",
        INTERPRETED,
    ),
    Fault(
        "row: dleft lacks the mask",
        BACKENDS + "triton/row.py",
        "y, q = y * keep, q * keep",
        "y, q = y * keep, q",
        INTERPRETED,
    ),
    Fault(
        "thin product: activation of the wrong stage",
        BACKENDS + "triton/thin.py",
        "activate(z, ACTIVATION)",
        "z",
        INTERPRETED,
    ),
    Fault(
        "fold: rounded to nearest",
        BACKENDS + "triton/fold.py",
        "if DROPPED_BITS > 0:",
        "if DROPPED_BITS > 99:",
        ["tests/backends/test_triton.py", "tests/ops/test_precision.py", *QUICK, "-k", "triton"],
    ),
    Fault(
        "eager: update added to a rounded y",
        BACKENDS + "eager/factored.py",
        "y.addmm_(tokens, weight.t())",
        "y.add_(tokens @ weight.t())",
        EAGER,
    ),
    Fault(
        "eager: one token's update added to a rounded y",
        BACKENDS + "eager/factored.py",
        "y[0].addmv_(weight, tokens[0])",
        "y[0].add_(weight @ tokens[0])",
        ["tests/ops/test_precision.py", *QUICK, "-k", "few_tokens"],
    ),
    Fault(
        "eager: a vector's product where W lies in columns",
        BACKENDS + "eager/factored.py",
        " and weight.is_contiguous()",
        "",
        ["tests/ops/test_precision.py", *QUICK, "-k", "few_tokens"],
    ),
    Fault(
        "eager: fold rounded to nearest",
        BACKENDS + "eager/fold.py",
        "    if is_16_bit(weight):\n        exact",
        "    if False:\n        exact",
        CPU_PASS,
    ),
    Fault(
        "eager: tile computed after it was overwritten",
        BACKENDS + "eager/sweep.py",
        "    if grad is not None:\n        activation",
        "    if grad is not None:\n        activate_(update.activation, pre)\n        activation",
        CPU_PASS,
    ),
    Fault(
        "eager: mask of the other stage",
        BACKENDS + "eager/sweep.py",
        "keep_mask(update.seed, update.stream,",
        "keep_mask(update.seed, 0,",
        CPU_PASS,
    ),
    Fault(
        "eager: gradient contracted before it passed the activation",
        BACKENDS + "eager/sweep.py",
        "elementwise_(update, rows, pre, grad, folding)\n        if",
        "elementwise_(update, rows, pre, None, folding)\n        if",
        CPU_PASS,
    ),
    Fault(
        "eager: rounding that starts anew in every tile",
        BACKENDS + "eager/fold.py",
        "rows.start * weight.shape[1]",
        "0",
        CPU_PASS,
    ),
]
