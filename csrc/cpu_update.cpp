// One pass over a tile of an update on a CPU: activation and slope, dropout, scale and rounding together.
// genft_kernels/backends/eager/cpu_pass.py compiles this file at its first use and calls it by ctypes.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu_math.h"
#include "cpu_philox.h"
#include "genft.h"

// A version for each kind of x86 CPU in one library, which thus may be kept where several machines read it; with
// GENFT_ONE_CPU, of tests, one for the CPU that the compiler is told.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(GENFT_ONE_CPU)
#define GENFT_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GENFT_FOR_EACH_CPU
#endif

// Rows of U = drop(activation(pre)) [rows, columns], and what is done with them. Matrices are contiguous, those of the
// whole update of one dtype; a null pointer is one that is not there, or not wanted.
struct Tile {
    void* pre;               // [tile rows, columns]; with `value` U takes its place
    void* grad;              // [tile rows, columns], the gradient of U, which that of `pre` takes the place of
    const void* weight;      // [tile rows, columns], rows `weight_stride` apart
    void* folded;            // [tile rows, columns] = weight + scale * U, rounded stochastically to 16 bits
    const int32_t* dither;   // [dither_size], read from `dither_start` on and round, an element for one of the tile
    int64_t weight_stride, dither_size, dither_start;
    int64_t first_row, tile_rows, rows, columns;  // first_row is a multiple of 4
    uint64_t seed;
    double scale, keep_scale;  // keep_scale = 1 / (1 - p)
    uint32_t stream, threshold;  // threshold = floor(p 2^32)
    int32_t dtype, activation, drops, value;
};

namespace genft::cpu {
namespace {

constexpr int kFloat64 = 3;        // beside those of genft.h
constexpr int64_t kBlockRows = 4;  // of one Philox block
const Draw kDraw = fastest_draw();

template <class Format>
struct Lanes {
    using Stored = typename Format::Stored;
    using Wide = typename Format::Wide;
    alignas(64) Wide value[kLanes];

    // The lanes past `count` are zero.
    GENFT_INTO_EACH void load(const Stored* from, int64_t count) {
        Stored padded[kLanes] = {};
        if (count < kLanes) from = std::copy_n(from, count, padded) - count;
        for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = Format::load(from[lane]);
    }

    GENFT_INTO_EACH void store(Stored* to, int64_t count) const {
        Stored padded[kLanes];
        Stored* whole = count < kLanes ? padded : to;
        for (int64_t lane = 0; lane < kLanes; ++lane) whole[lane] = Format::store(value[lane]);
        if (count < kLanes) std::copy_n(padded, count, to);
    }

    GENFT_INTO_EACH void multiply(const Lanes& other) {
        for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] *= other.value[lane];
    }
};

// Whether each element of a block's rows is kept, times `keep_scale`.
template <class Format>
GENFT_INTO_EACH void draw(const Tile& tile, int64_t row, int64_t column, Lanes<Format> (&keep)[kBlockRows]) {
    using Wide = typename Format::Wide;
    const Wide kept = Wide(tile.keep_scale);
    const uint32_t threshold = tile.threshold;
    const uint64_t first = block_counter(column, row, tile.rows);
    alignas(64) ManyWords words;
    kDraw(first, block_counter(column + 1, row, tile.rows) - first, tile.stream, tile.seed, words);
    for (int j = 0; j < kBlockRows; ++j) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            keep[j].value[lane] = words[j][lane] >= threshold ? kept : Wide(0);
        }
    }
}

template <class Activation, class Format>
GENFT_INTO_EACH void apply(Lanes<Format>& z, Lanes<Format>& grad, bool has_grad) {
    if (has_grad) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            z.value[lane] = Activation::apply(z.value[lane], grad.value[lane]);
        }
    } else {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            typename Format::Wide unused = 0;
            z.value[lane] = Activation::apply(z.value[lane], unused);
        }
    }
}

template <class Format>
GENFT_INTO_EACH void activate(int activation, Lanes<Format>& z, Lanes<Format>& grad, bool has_grad) {
    switch (activation) {
        case kRelu: return apply<Relu>(z, grad, has_grad);
        case kLeakyRelu: return apply<LeakyRelu>(z, grad, has_grad);
        case kGelu: return apply<Gelu>(z, grad, has_grad);
        case kSilu: return apply<Silu>(z, grad, has_grad);
        case kTanh: return apply<Tanh>(z, grad, has_grad);
    }
}

// Up or down to a neighbour among the numbers that lack kDroppedBits, with the odds of the distance.
template <class Format>
GENFT_INTO_EACH void round_stochastically(const Tile& tile, int64_t element, Lanes<Format>& exact) {
    if constexpr (Format::kDroppedBits > 0) {
        const int64_t start = (tile.dither_start + element) % tile.dither_size;
        int32_t wrapped[kLanes];
        const int32_t* dither = tile.dither + start;
        if (start + kLanes > tile.dither_size) {
            for (int64_t lane = 0; lane < kLanes; ++lane) wrapped[lane] = tile.dither[(start + lane) % tile.dither_size];
            dither = wrapped;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const uint32_t bits = bits_of<uint32_t>(exact.value[lane]) + uint32_t(dither[lane]);
            exact.value[lane] = bits_of<float>(bits & ~((1u << Format::kDroppedBits) - 1u));
        }
    }
}

template <class Format>
GENFT_INTO_EACH void fold(const Tile& tile, int64_t row, int64_t column, int64_t count, Lanes<Format>& update) {
    using Stored = typename Format::Stored;
    const auto scale = typename Format::Wide(tile.scale);
    Lanes<Format> exact;
    exact.load(static_cast<const Stored*>(tile.weight) + row * tile.weight_stride + column, count);
    for (int64_t lane = 0; lane < kLanes; ++lane) exact.value[lane] += scale * update.value[lane];
    const int64_t element = row * tile.columns + column;
    round_stochastically<Format>(tile, element, exact);
    exact.store(static_cast<Stored*>(tile.folded) + element, count);
}

// Blocks of four rows, counted from the tile's first.
template <class Format>
GENFT_INTO_EACH void pass(const Tile& tile, int64_t first, int64_t last) {
    using Stored = typename Format::Stored;
    for (int64_t block = first; block < last; ++block) {
        const int64_t top = kBlockRows * block, bottom = std::min(top + kBlockRows, tile.tile_rows);
        for (int64_t column = 0; column < tile.columns; column += kLanes) {
            const int64_t count = std::min(kLanes, tile.columns - column);
            Lanes<Format> keep[kBlockRows], update, grad;
            if (tile.drops) draw<Format>(tile, tile.first_row + top, column, keep);
            for (int64_t row = top; row < bottom; ++row) {
                Stored* pre = static_cast<Stored*>(tile.pre) + row * tile.columns + column;
                Stored* gradient = static_cast<Stored*>(tile.grad) + row * tile.columns + column;
                update.load(pre, count);
                if (tile.grad) grad.load(gradient, count);
                if (tile.grad && tile.drops) grad.multiply(keep[row - top]);
                activate<Format>(tile.activation, update, grad, tile.grad != nullptr);
                if (tile.drops) update.multiply(keep[row - top]);
                if (tile.grad) grad.store(gradient, count);
                if (tile.value) update.store(pre, count);
                if (tile.folded) fold<Format>(tile, row, column, count, update);
            }
        }
    }
}

GENFT_FOR_EACH_CPU
void pass_of_dtype(const Tile& tile, int64_t first, int64_t last) {
    switch (tile.dtype) {
        case kFloat32: return pass<Plain<float>>(tile, first, last);
        case kFloat16: return pass<Float16>(tile, first, last);
        case kBFloat16: return pass<BFloat16>(tile, first, last);
        case kFloat64: return pass<Plain<double>>(tile, first, last);
    }
}

}  // namespace
}  // namespace genft::cpu

// PyTorch's own threads, where they are OpenMP's: while they wait for its next operation they spin, and others would
// have to share their cores. Null where there are none.
using InParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

static InParallel pytorchs_threads() {
    static const auto found = reinterpret_cast<InParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Shares {
    const Tile& tile;
    const int64_t blocks, share;
    std::atomic<int64_t> next{0};

    static void take(void* self) {
        auto& shares = *static_cast<Shares*>(self);
        for (int64_t first; (first = shares.next.fetch_add(shares.share)) < shares.blocks;) {
            genft::cpu::pass_of_dtype(shares.tile, first, std::min(first + shares.share, shares.blocks));
        }
    }
};

// The result does not depend on the number of threads.
extern "C" void genft_update_tile(const Tile* tile, int threads) {
    const int64_t blocks = (tile->tile_rows + genft::cpu::kBlockRows - 1) / genft::cpu::kBlockRows;
    Shares shares{*tile, blocks, std::max<int64_t>(1, (blocks + threads - 1) / threads)};
    if (const InParallel in_parallel = pytorchs_threads(); in_parallel != nullptr && threads > 1) {
        return in_parallel(Shares::take, &shares, unsigned(threads), 0);
    }
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(Shares::take, &shares);
    Shares::take(&shares);
    for (std::thread& other : others) other.join();
}
