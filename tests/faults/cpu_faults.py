"""Faults in the compiled pass over a CPU's tile (csrc/cpu_*) and in the call of it."""

from tests.faults.planting import Fault

CALL, PASS = "genft_kernels/backends/eager/cpu_pass.py", "csrc/cpu_update.cpp"
MATH, DRAW = "csrc/cpu_math.h", "csrc/cpu_philox.h"
TESTS = ["tests/backends/test_cpu_pass.py", "-m", "not slow"]
EVERY_CPU = ["tests/backends/test_cpu_pass.py", "-k", "every_cpu"]


def planted(what: str, file: str, old: str, new: str, tests: list[str] = TESTS) -> Fault:
    return Fault(f"CPU pass: {what}", file, old, new, tests)


FAULTS = [
    planted("words of a block in another order", PASS, "words[j][lane] >=", "words[3 - j][lane] >="),
    planted("a thread's last block left out", PASS, "shares.share, shares.blocks)", "shares.share, shares.blocks) - 1"),
    planted("the rest of a row left out", PASS, "column < tile.columns;", "column + kLanes <= tile.columns;"),
    planted("rows past the tile's last", PASS, "std::min(top + kBlockRows, tile.tile_rows)", "top + kBlockRows"),
    planted("gradient without the mask", PASS, "if (tile.grad && tile.drops)", "if (false)"),
    planted("value without the mask", PASS, "if (tile.drops) update.multiply", "if (false) update.multiply"),
    planted("value written unasked", PASS, "if (tile.value)", "if (true)"),
    planted("dither not taken round", PASS, "(start + lane) % tile.dither_size", "lane % tile.dither_size"),
    planted("rows of the weight assumed to be dense", PASS, "row * tile.weight_stride", "row * tile.columns"),
    planted("update folded without its scale", PASS, "+= scale * update", "+= update"),
    planted(
        "lanes past a row's end stored", PASS, "Stored* whole = count < kLanes ? padded : to", "Stored* whole = to"
    ),
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
    planted("bfloat16 cut off", MATH, "(bits + 0x7FFFu + ((bits >> 16) & 1u))", "bits"),
    planted("bfloat16 ties away from even", MATH, "0x7FFFu + ((bits >> 16) & 1u)", "0x8000u"),
    planted("float16 subnormal as normal", MATH, "a < 0x1p-14f", "a < 0x1p-15f"),
    planted("float16 overflow", MATH, "a >= 65520.0f", "a >= 1e30f"),
    planted("float16 infinity read as a number", MATH, "== 0x7C00u ? 0x7F800000u : 0u", "== 0x7C00u ? 0u : 0u"),
    planted("rounding that starts anew in every tile", CALL, "rows.start * weight.shape[1]", "0"),
    planted("a transposed weight read as it lies", CALL, "if weight.stride(1) == 1 or", "if True or"),
    planted("stream of the column stage", CALL, "int(update.seed), update.stream", "int(update.seed), 0"),
    planted(
        "old code for new sources", CALL, "(command, platform.machine(), sources)", "(command, platform.machine())"
    ),
    planted("code of another kind of machine", CALL, "(command, platform.machine(), sources)", "(command, sources)"),
]
