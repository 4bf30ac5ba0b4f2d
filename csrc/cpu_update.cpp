// One sweep over an update on a CPU: its numbers from the thin factors, all that is elementwise, and what is summed of
// them, while they are in registers and the first cache. genft_kernels/backends/eager/cpu_pass.py compiles this file at
// its first use and calls it by ctypes.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu_block.h"

namespace genft::cpu {
namespace {

// Rows that one thread takes at a time. Sums over rows are added up in this order, whatever the number of threads.
constexpr int64_t kChunkRows = 128;

int64_t strips_of(const Sweep& sweep) { return (sweep.columns + kLanes - 1) / kLanes; }

// What all threads share: thin matrices of the columns, and sums of them, in strips [strips, units, kLanes].
template <class Wide>
struct Columns {
    std::vector<Wide> right, others_right, right_sums, others_right_sums;

    explicit Columns(const Sweep& sweep)
        : right(in_strips(sweep, sweep.right, sweep.k)),
          others_right(in_strips(sweep, sweep.others_right, sweep.m)),
          right_sums(sweep.right_sums ? right.size() : 0),
          others_right_sums(sweep.others_right_sums ? sweep.m * strips_of(sweep) * kLanes : 0) {}

    // To where they are wanted.
    void write(const Sweep& sweep) const {
        add(sweep, right_sums, sweep.k, sweep.right_sums);
        add(sweep, others_right_sums, sweep.m, sweep.others_right_sums);
    }

private:
    static std::vector<Wide> in_strips(const Sweep& sweep, const Thin& thin, int64_t units) {
        std::vector<Wide> strips(thin.data ? units * strips_of(sweep) * kLanes : 0);
        for (int64_t first = 0; thin.data && first < sweep.columns; first += kLanes) {
            const int64_t count = std::min(kLanes, sweep.columns - first);
            gather(sweep, thin, first, count, units, kLanes, strips.data() + first * units);
        }
        return strips;
    }

    static void add(const Sweep& sweep, const std::vector<Wide>& strips, int64_t units, void* sums) {
        for (int64_t column = 0; !strips.empty() && column < sweep.columns; ++column) {
            const Wide* from = strips.data() + column / kLanes * kLanes * units + column % kLanes;
            for (int64_t j = 0; j < units; ++j) static_cast<Wide*>(sums)[column * units + j] += from[j * kLanes];
        }
    }
};

// The numbers of one thread.
template <class Wide>
struct Room {
    Block<Wide> keep;
    std::vector<Block<Wide>> update, grad;            // of a block's strips
    std::vector<Wide> left, others_left;              // of a block, [units, kBlockRows]
    std::vector<Wide> right_sums, others_right_sums;  // of a chunk

    // For the next chunk.
    void clear(const Sweep& sweep, const Columns<Wide>& columns) {
        update.resize(strips_of(sweep));
        grad.resize(strips_of(sweep));
        left.resize(sweep.k * kBlockRows);
        others_left.resize(sweep.m * kBlockRows);
        right_sums.assign(columns.right_sums.size(), Wide(0));
        others_right_sums.assign(columns.others_right_sums.size(), Wide(0));
    }
};

// Rows `first` to `last` of the sweep; sums over them stay in the room.
template <class Wide, int kBytes>
GENFT_INTO_EACH void rows_of(const Sweep& sweep, const Columns<Wide>& columns, int64_t first, int64_t last,
                             Room<Wide>& room) {
    using Products = ThinProducts<Wide, kBytes>;
    const int64_t k = sweep.k, m = sweep.m, strips = room.update.size();
    const Wide *right = columns.right.data(), *others_right = columns.others_right.data();
    const bool of_grad = sweep.has_gradient, thin_grad = of_grad && !sweep.grad;
    for (int64_t top = first; top < last; top += kBlockRows) {
        const int64_t height = std::min(kBlockRows, last - top);
        gather(sweep, sweep.left, top, height, k, kBlockRows, room.left.data());
        if (sweep.others_left.data) {
            gather(sweep, sweep.others_left, top, height, m, kBlockRows, room.others_left.data());
        }
        for (int64_t column = 0; column < sweep.columns; column += kLanes) {
            Block<Wide>&update = room.update[column / kLanes], &grad = room.grad[column / kLanes];
            Products::product(room.left.data(), right + column * k, k, update);
            if (thin_grad) Products::product(room.others_left.data(), others_right + column * m, m, grad);
            if (sweep.grad) {
                for_format(sweep.dtype, Wide(), [&](auto format) GENFT_INTO_LAMBDA {
                    load_grad<decltype(format)>(sweep, top, column, height, grad);
                });
            }
            if (sweep.drops) draw(sweep, sweep.first_row + top, column, room.keep);
            if (sweep.drops && of_grad) multiply(grad, room.keep);
            activate(sweep.activation, update, grad, of_grad);
            if (sweep.drops) multiply(update, room.keep);
            clear_from(update, sweep.columns - column);
            if (of_grad) clear_from(grad, sweep.columns - column);
            if (sweep.folded) {
                for_format(sweep.dtype, Wide(), [&](auto format) GENFT_INTO_LAMBDA {
                    fold<decltype(format)>(sweep, top, column, height, update);
                });
            }
            if (sweep.right_sums) Products::sum_rows(grad, room.left.data(), k, room.right_sums.data() + column * k);
            if (sweep.others_right_sums) {
                Products::sum_rows(update, room.others_left.data(), m, room.others_right_sums.data() + column * m);
            }
        }
        if (sweep.left_sums) {
            auto* sums = static_cast<Wide*>(sweep.left_sums) + top * k;
            Products::sum_columns(room.grad.data(), strips, right, k, height, sums);
        }
        if (sweep.others_left_sums) {
            auto* sums = static_cast<Wide*>(sweep.others_left_sums) + top * m;
            Products::sum_columns(room.update.data(), strips, others_right, m, height, sums);
        }
    }
}

// A version for each kind of x86 CPU in one library, which thus may be kept where several machines read it; with
// GENFT_ONE_CPU, of tests, one for the CPU that the compiler is told.
#if defined(GENFT_ONE_CPU) && defined(__AVX512F__)
constexpr int kOwnBytes = 64;
#elif defined(GENFT_ONE_CPU) && defined(__AVX2__)
constexpr int kOwnBytes = 32;
#else
constexpr int kOwnBytes = 16;
#endif

template <class Wide>
void rows_portably(const Sweep& sweep, const Columns<Wide>& columns, int64_t first, int64_t last, Room<Wide>& room) {
    rows_of<Wide, kOwnBytes>(sweep, columns, first, last, room);
}

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(GENFT_ONE_CPU)
template <class Wide>
__attribute__((target("arch=x86-64-v4"))) void rows_by_avx512(const Sweep& sweep, const Columns<Wide>& columns,
                                                              int64_t first, int64_t last, Room<Wide>& room) {
    rows_of<Wide, 64>(sweep, columns, first, last, room);
}

template <class Wide>
__attribute__((target("arch=x86-64-v3"))) void rows_by_avx2(const Sweep& sweep, const Columns<Wide>& columns,
                                                            int64_t first, int64_t last, Room<Wide>& room) {
    rows_of<Wide, 32>(sweep, columns, first, last, room);
}

template <class Wide>
auto fastest_rows() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return rows_by_avx512<Wide>;
    if (__builtin_cpu_supports("x86-64-v3")) return rows_by_avx2<Wide>;
    return rows_portably<Wide>;
}
#else
template <class Wide>
auto fastest_rows() {
    return rows_portably<Wide>;
}
#endif

// The chunks of a sweep, which threads take one by one.
template <class Wide>
struct Chunks {
    const Sweep& sweep;
    Columns<Wide>& columns;
    std::atomic<int64_t> next{0}, added{0};  // the chunk to take; that whose sums are to be added

    static void take(void* self) {
        static const auto rows = fastest_rows<Wide>();
        thread_local Room<Wide> room;  // it is large, and fresh memory costs page faults
        auto& chunks = *static_cast<Chunks*>(self);
        const Sweep& sweep = chunks.sweep;
        const int64_t count = chunks.count();
        for (int64_t chunk; (chunk = chunks.next.fetch_add(1)) < count;) {
            room.clear(sweep, chunks.columns);
            const int64_t first = kChunkRows * chunk;
            rows(sweep, chunks.columns, first, std::min(first + kChunkRows, sweep.rows), room);
            while (chunks.added.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
            add(room.right_sums, chunks.columns.right_sums);
            add(room.others_right_sums, chunks.columns.others_right_sums);
            chunks.added.store(chunk + 1, std::memory_order_release);
        }
    }

    int64_t count() const { return (sweep.rows + kChunkRows - 1) / kChunkRows; }

    static void add(const std::vector<Wide>& part, std::vector<Wide>& to) {
        for (size_t i = 0; i < part.size(); ++i) to[i] += part[i];
    }
};

// PyTorch's own threads, where they are OpenMP's: while they wait for its next operation they spin, and others would
// have to share their cores. Null where there are none.
using InParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

InParallel pytorchs_threads() {
    static const auto found = reinterpret_cast<InParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

template <class Work>
void in_parallel(Work& work, int threads) {
    if (const InParallel openmp = pytorchs_threads(); openmp != nullptr && threads > 1) {
        return openmp(Work::take, &work, unsigned(threads), 0);
    }
    std::vector<std::thread> threads_beside;
    for (int thread = 1; thread < threads; ++thread) threads_beside.emplace_back(Work::take, &work);
    Work::take(&work);
    for (std::thread& thread : threads_beside) thread.join();
}

template <class Wide>
void run(const Sweep& sweep, int threads) {
    Columns<Wide> columns(sweep);
    Chunks<Wide> chunks{sweep, columns};
    in_parallel(chunks, int(std::min<int64_t>(threads, chunks.count())));
    columns.write(sweep);
}

}  // namespace
}  // namespace genft::cpu

// No result depends on the number of threads.
extern "C" void genft_sweep(const Sweep* sweep, int threads) {
    if (sweep->dtype == genft::cpu::kFloat64) return genft::cpu::run<double>(*sweep, threads);
    genft::cpu::run<float>(*sweep, threads);
}
