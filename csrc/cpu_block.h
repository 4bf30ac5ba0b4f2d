// What is elementwise of a sweep over an update on a CPU, on blocks of its numbers: read, activated, masked, folded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_math.h"
#include "cpu_philox.h"
#include "cpu_thin.h"
#include "genft.h"

// A thin matrix [n, units] of the sweep's dtype that lies in memory as it likes.
struct Thin {
    const void* data;
    int64_t stride, unit_stride;
};

// Rows of U = drop(activation(left right^T)) [rows, columns] and what is done with them. P is the gradient of
// left right^T; that of U is `grad`, or else others_left others_right^T. Matrices are of `dtype`; sums are contiguous
// and of the wide dtype (float64 of float64, else float32). A null pointer is one that is not there, or not wanted.
struct Sweep {
    Thin left, right;                // [rows, k], [columns, k]
    Thin others_left, others_right;  // [rows, m], [columns, m]
    const void* grad;                // [rows, columns], contiguous
    void *left_sums, *right_sums;    // [rows, k] = P right, [columns, k] += P^T left
    void *others_left_sums, *others_right_sums;  // [rows, m] = U others_right, [columns, m] += U^T others_left
    const void* weight;                          // [rows, columns], rows `weight_stride` apart
    void* folded;           // [rows, columns] = weight + scale * U, rounded stochastically to 16 bits
    const int32_t* dither;  // [dither_size], read from `dither_start` on and round, an element for one of the rows
    int64_t k, m, weight_stride, dither_size, dither_start;
    int64_t first_row, rows, all_rows, columns;  // first_row, of all_rows, is a multiple of 4
    uint64_t seed;
    double scale, keep_scale;    // keep_scale = 1 / (1 - p)
    uint32_t stream, threshold;  // threshold = floor(p 2^32)
    int32_t dtype, activation, drops, has_gradient;
};

namespace genft::cpu {

constexpr int kFloat64 = 3;  // beside those of genft.h
const Draw kDraw = fastest_draw();  // not inline: two libraries in one process would have the first one's

// The action with the format that is stored.
template <class Action>
GENFT_INTO_EACH void for_format(int dtype, float, Action&& action) {
    switch (dtype) {
        case kFloat32: return action(Plain<float>());
        case kFloat16: return action(Float16());
        case kBFloat16: return action(BFloat16());
    }
}
template <class Action>
GENFT_INTO_EACH void for_format(int, double, Action&& action) {
    action(Plain<double>());
}

// `count` rows of a thin matrix, transposed: [units, lanes], with zeros past the last.
template <class Wide>
GENFT_INTO_EACH void gather(const Sweep& sweep, const Thin& thin, int64_t first, int64_t count, int64_t units,
                            int64_t lanes, Wide* to) {
    for_format(sweep.dtype, Wide(), [&](auto format) GENFT_INTO_LAMBDA {
        const auto* from = static_cast<const typename decltype(format)::Stored*>(thin.data) + first * thin.stride;
        for (int64_t j = 0; j < units; ++j) {
            for (int64_t i = 0; i < lanes; ++i) {
                to[j * lanes + i] = i < count ? format.load(from[i * thin.stride + j * thin.unit_stride]) : Wide(0);
            }
        }
    });
}

// A row's elements of a strip, `count` of them: the lanes past them are zero.
template <class Format>
GENFT_INTO_EACH void load(const typename Format::Stored* from, int64_t count, typename Format::Wide* value) {
    typename Format::Stored padded[kLanes] = {};
    if (count < kLanes) from = std::copy_n(from, count, padded) - count;
    for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = Format::load(from[lane]);
}

template <class Format>
GENFT_INTO_EACH void store(const typename Format::Wide* value, int64_t count, typename Format::Stored* to) {
    typename Format::Stored padded[kLanes], *whole = count < kLanes ? padded : to;
    for (int64_t lane = 0; lane < kLanes; ++lane) whole[lane] = Format::store(value[lane]);
    if (count < kLanes) std::copy_n(padded, count, to);
}

// Whether each element of a block's rows is kept, times `keep_scale`.
template <class Wide>
GENFT_INTO_EACH void draw(const Sweep& sweep, int64_t row, int64_t column, Block<Wide>& keep) {
    const Wide kept = Wide(sweep.keep_scale);
    const uint32_t threshold = sweep.threshold;
    alignas(64) ManyWords words;
    for (int64_t i = 0; i < kBlockRows; i += 4) {
        const uint64_t first = block_counter(column, row + i, sweep.all_rows);
        kDraw(first, block_counter(column + 1, row + i, sweep.all_rows) - first, sweep.stream, sweep.seed, words);
        for (int j = 0; j < 4; ++j) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                keep[i + j][lane] = words[j][lane] >= threshold ? kept : Wide(0);
            }
        }
    }
}

template <class Activation, class Wide>
GENFT_INTO_EACH void apply(Block<Wide>& z, Block<Wide>& grad, bool has_grad) {
    if (has_grad) {
        for (int64_t i = 0; i < kBlockRows * kLanes; ++i) z[0][i] = Activation::apply(z[0][i], grad[0][i]);
    } else {
        for (int64_t i = 0; i < kBlockRows * kLanes; ++i) {
            Wide unused = 0;
            z[0][i] = Activation::apply(z[0][i], unused);
        }
    }
}

template <class Wide>
GENFT_INTO_EACH void activate(int activation, Block<Wide>& z, Block<Wide>& grad, bool has_grad) {
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
GENFT_INTO_EACH void round_stochastically(const Sweep& sweep, int64_t element, typename Format::Wide* exact) {
    if constexpr (Format::kDroppedBits > 0) {
        const int64_t start = (sweep.dither_start + element) % sweep.dither_size;
        int32_t wrapped[kLanes];
        const int32_t* dither = sweep.dither + start;
        if (start + kLanes > sweep.dither_size) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                wrapped[lane] = sweep.dither[(start + lane) % sweep.dither_size];
            }
            dither = wrapped;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const uint32_t bits = bits_of<uint32_t>(exact[lane]) + uint32_t(dither[lane]);
            exact[lane] = bits_of<float>(bits & ~((1u << Format::kDroppedBits) - 1u));
        }
    }
}

// What is stored of a block: its gradient is read, its folded weight written.
template <class Format>
GENFT_INTO_EACH void load_grad(const Sweep& sweep, int64_t top, int64_t column, int64_t height,
                               Block<typename Format::Wide>& grad) {
    const int64_t count = std::min(kLanes, sweep.columns - column);
    for (int64_t i = 0; i < height; ++i) {
        const auto* from = static_cast<const typename Format::Stored*>(sweep.grad);
        load<Format>(from + (top + i) * sweep.columns + column, count, grad[i]);
    }
}

template <class Format>
GENFT_INTO_EACH void fold(const Sweep& sweep, int64_t top, int64_t column, int64_t height,
                          const Block<typename Format::Wide>& update) {
    using Stored = typename Format::Stored;
    const auto scale = typename Format::Wide(sweep.scale);
    const int64_t count = std::min(kLanes, sweep.columns - column);
    for (int64_t i = 0; i < height; ++i) {
        alignas(64) typename Format::Wide exact[kLanes];
        load<Format>(static_cast<const Stored*>(sweep.weight) + (top + i) * sweep.weight_stride + column, count, exact);
        for (int64_t lane = 0; lane < kLanes; ++lane) exact[lane] += scale * update[i][lane];
        const int64_t element = (top + i) * sweep.columns + column;
        round_stochastically<Format>(sweep, element, exact);
        store<Format>(exact, count, static_cast<Stored*>(sweep.folded) + element);
    }
}

}  // namespace genft::cpu
