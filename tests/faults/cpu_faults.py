"""Faults in the compiled pass over a CPU's tile (csrc/cpu_*) and in the call of it."""

from tests.faults.planting import Fault

CALL, SWEEP = "genft_kernels/backends/eager/cpu_pass.py", "csrc/cpu_update.cpp"
MATH, DRAW, BLOCK, THIN = "csrc/cpu_math.h", "csrc/cpu_philox.h", "csrc/cpu_block.h", "csrc/cpu_thin.h"
TESTS = ["tests/backends/test_cpu_pass.py", "-m", "not slow"]
LIBRARY = ["tests/backends/test_cpu_library.py", "-m", "not slow"]
EVERY_CPU = ["tests/backends/test_cpu_pass.py", "-k", "every_cpu"]


def planted(what: str, file: str, old: str, new: str, tests: list[str] = TESTS) -> Fault:
    return Fault(f"CPU sweep: {what}", file, old, new, tests)


FAULTS = [
    planted("words of a block in another order", BLOCK, "words[j][lane] >=", "words[3 - j][lane] >="),
    planted("the mask of a block's first rows for all", BLOCK, "keep[i + j][lane] =", "keep[j][lane] ="),
    planted(
        "a chunk's last block left out", SWEEP, "first + kChunkRows, sweep.rows)", "first + kChunkRows, sweep.rows) - 8"
    ),
    planted(
        "the rest of a row left out",
        SWEEP,
        "column < sweep.columns; column += kLanes) {\n            Block",
        "column + kLanes <= sweep.columns; column += kLanes) {\n            Block",
    ),
    planted("rows past the last", SWEEP, "std::min(kBlockRows, last - top)", "kBlockRows"),
    planted("gradient without the mask", SWEEP, "if (sweep.drops && of_grad)", "if (false)"),
    planted("value without the mask", SWEEP, "if (sweep.drops) multiply(update", "if (false) multiply(update"),
    planted("lanes past the last column kept", THIN, "block[i][lane] = 0;", "(void)block;"),
    planted(
        "sums of another chunk's rows",
        SWEEP,
        "        right_sums.assign(columns.right_sums.size(), Wide(0));",
        "        right_sums.resize(columns.right_sums.size());",
    ),
    planted("sums of units beyond a multiple of four left out", THIN, "for (; j < k; ++j)", "for (; j + 1 < k; ++j)"),
    planted("sums of one strip", THIN, "strip < strips; ++strip", "strip < 1; ++strip"),
    planted("thin matrices read as if they were dense", BLOCK, "i * thin.stride + j", "i * units + j"),
    planted("dither not taken round", BLOCK, "(start + lane) % sweep.dither_size", "lane % sweep.dither_size"),
    planted(
        "rows of the weight assumed to be dense", BLOCK, "(top + i) * sweep.weight_stride", "(top + i) * sweep.columns"
    ),
    planted("update folded without its scale", BLOCK, "+= scale * update", "+= update"),
    planted("lanes past a row's end stored", BLOCK, "*whole = count < kLanes ? padded : to", "*whole = to"),
    planted(
        "AVX-512: counters half as far apart", DRAW, "(lane + 8 * v + i) * step", "(lane + 4 * v + i) * step", EVERY_CPU
    ),
    planted("AVX2: lanes in another order", DRAW, "mixed, 0xD8", "mixed, 0xE4", EVERY_CPU),
    planted("AVX2: keys exchanged", DRAW, "c1[v]), keys0)", "c1[v]), keys1)", EVERY_CPU),
    planted("portable: the next counter", DRAW, "counter + lane * step", "counter + (lane + 1) * step", EVERY_CPU),
    planted("slope of relu at 0", MATH, "grad = z <= T(0)", "grad = z < T(0)"),
    planted("slope of gelu without the density", MATH, "below + z * (T(0.39", "below + T(0) * (T(0.39"),
    planted("slope of silu", MATH, "(T(1) + z * other)", "(T(1) + z * sigmoid)"),
    planted("slope of tanh", MATH, "T(1) - value * value", "T(1) - value"),
    planted("tanh cancels near 0", MATH, "e.rest + (e.power - 1.0f);", "e.rest + e.power - 1.0f + 1e-6f;"),
    planted("a coefficient of gelu", MATH, "0.900906742f", "0.901906742f"),
    planted("a coefficient of the exponential", MATH, "1.0f / 24;", "1.0f / 25;"),
    planted("float16 subnormal as normal", MATH, "a < 0x1p-14f", "a < 0x1p-15f"),
    planted("float16 overflow", MATH, "a >= 65520.0f", "a >= 1e30f"),
    planted("float16 infinity read as a number", MATH, "== 0x7C00u ? 0x7F800000u : 0u", "== 0x7C00u ? 0u : 0u"),
    planted("rounding that starts anew in every tile", CALL, "rows.start * weight.shape[1]", "0"),
    planted("a transposed weight read as it lies", CALL, "if weight.stride(1) == 1 or", "if True or"),
    planted("stream of the column stage", CALL, "int(update.seed), update.stream", "int(update.seed), 0"),
    planted("sums of a tile in the first one's place", CALL, "left=_rows(sums.left, part)", "left=sums.left"),
    planted("sums on the default device", CALL, ", device=left.device", ""),
    planted(
        "scratch memory on the default device",
        "genft_kernels/scratch.py",
        ", dtype=torch.uint8, device=device",
        ", dtype=torch.uint8",
    ),
    planted("dither on the default device", "genft_kernels/backends/eager/rounding.py", '// 4, device="cpu"', "// 4"),
    planted("the mask's scale on the default device", "genft_kernels/backends/eager/sweep.py", ', device="cpu"', ""),
    planted(
        "old code for new sources",
        CALL,
        "(command, platform.machine(), sources)",
        "(command, platform.machine())",
        LIBRARY,
    ),
    planted(
        "code of another kind of machine", CALL, "(command, platform.machine(), sources)", "(command, sources)", LIBRARY
    ),
]
