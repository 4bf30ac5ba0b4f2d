// One fiber for each CUDA thread of a block; blocks run one after another.
//
// A warp runs until all of its lanes wait, then the next one does: a thread that a missing barrier lets through runs
// far ahead of the others, so that what it reads too early is still NaN and what it overwrites too early is missed.
#pragma once

#include <csetjmp>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>

#include "memory.h"

namespace cuda_host {

struct Index {
    unsigned x, y, z;
};

struct Copy {
    void* to;
    const void* from;
    int group;
};

// Threads that meet at one place: a warp's collective, or the block's barrier.
struct Meeting {
    const char* what = nullptr;  // all must have come for the same
    int arrived = 0;
    unsigned round = 0;
    void* lane[32] = {};  // what each lane brought
};

struct Fiber {
    ucontext_t first;     // where it starts,
    jmp_buf resume;       // and where it goes on
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    const Meeting* meeting = nullptr;  // where it waits,
    unsigned round = 0;                // until this round is over
    std::deque<Copy> copies;
    int group = 0;

    bool waits() const { return meeting != nullptr && meeting->round == round; }
};

struct Block {
    std::deque<Fiber> fibers;  // kept from launch to launch
    std::vector<Meeting> warps;
    Meeting barrier;
    SharedMemory shared;
    std::function<void()> kernel;
    int threads = 0, running = 0;  // how many threads; whose turn it is
    Index block, grid;
    jmp_buf scheduler;
    std::string failure;
};

inline Block block;
inline std::string last_failure;  // what error_string says

inline Fiber& current() { return block.fibers[block.running]; }

// Back to the scheduler. setjmp and longjmp, because swapcontext costs two system calls.
inline void leave() {
    if (_setjmp(current().resume) == 0) _longjmp(block.scheduler, 1);
}

// Ends the launch: the fibers are left where they are.
[[noreturn]] inline void fail(const std::string& why) {
    if (block.failure.empty()) {
        block.failure = why + " (thread " + std::to_string(block.running) + " of block " +
                        std::to_string(block.block.x) + ", " + std::to_string(block.block.y) + ", " +
                        std::to_string(block.block.z) + ")";
    }
    _longjmp(block.scheduler, 1);
}

inline void run_kernel() {
    for (;;) {  // once for each block
        block.kernel();
        for (const Copy& copy : current().copies) {
            if (copy.to != nullptr) fail("a copy was never waited for");
        }
        current().done = true;
        leave();
    }
}

// Waits for `count` threads at a meeting; the last to come does the work for all.
template <class Work>
void meet(Meeting& meeting, const char* what, int count, int place, void* brought, Work work) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) fail(std::string("threads of a warp at ") + meeting.what + " and at " + what);
    if (place >= 0) meeting.lane[place] = brought;
    if (++meeting.arrived == count) {
        work();
        meeting.arrived = 0;
        ++meeting.round;
    } else {
        current().meeting = &meeting;
        current().round = meeting.round;
        leave();
    }
}

// A warp's collective: work(lanes) sees what each of the 32 brought.
template <class Brought, class Work>
void with_warp(const char* what, Brought& brought, Work work) {
    Meeting& warp = block.warps[block.running / 32];
    meet(warp, what, 32, block.running % 32, &brought, [&] { work(reinterpret_cast<Brought**>(warp.lane)); });
}

inline void start(Fiber& fiber) {
    constexpr size_t kStack = 64 << 10;
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, run_kernel, 0);
    fiber.started = true;
    setcontext(&fiber.first);
}

// Lets the running fiber go on until it waits, is done, or fails.
inline void take_turn() {
    if (_setjmp(block.scheduler) == 0) {
        Fiber& fiber = current();
        if (fiber.started) {
            _longjmp(fiber.resume, 1);
        } else {
            start(fiber);
        }
    }
}

// Runs a warp's lanes until all wait; false if none could go on.
inline bool run_warp(int warp) {
    bool progress = false;
    for (bool again = true; again;) {
        again = false;
        for (block.running = warp * 32; block.running < warp * 32 + 32; ++block.running) {
            Fiber& fiber = current();
            if (fiber.done || fiber.waits()) continue;
            take_turn();
            if (!block.failure.empty()) return true;
            progress = again = true;
        }
    }
    return progress;
}

inline void run_block() {
    static unsigned turn = 0;  // another warp begins each time, and the order changes
    const int warps = block.threads / 32;
    block.warps.assign(warps, {});
    block.barrier = {};
    block.shared.poison();
    for (int i = 0; i < block.threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.done = false;
        fiber.meeting = nullptr;
        fiber.copies.clear();
        fiber.group = 0;
    }
    for (bool progress = true; progress && block.failure.empty(); ++turn) {
        progress = false;
        for (int i = 0; i < warps && block.failure.empty(); ++i) {
            const int place = (turn / 2 + i) % warps;
            progress |= run_warp(turn % 2 == 0 ? place : warps - 1 - place);
        }
    }
    for (int i = 0; i < block.threads && block.failure.empty(); ++i) {
        if (!block.fibers[i].done) block.failure = "deadlock: not all threads come to a barrier or a collective";
    }
    if (block.failure.empty() && !block.shared.fences_stand()) block.failure = "written outside shared memory";
}

// All blocks of a launch, one after another; false if one failed.
inline bool run(Index grid, int threads, size_t shared_bytes, std::function<void()> kernel) {
    block.kernel = std::move(kernel);
    block.threads = threads;
    block.grid = grid;
    block.failure.clear();
    block.shared.resize(shared_bytes);
    if (block.fibers.size() < static_cast<size_t>(threads)) block.fibers.resize(threads);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block.block = {x, y, z};
                run_block();
                if (!block.failure.empty()) {
                    last_failure = block.failure;
                    for (Fiber& fiber : block.fibers) fiber.started = false;  // left in the middle
                    return false;
                }
            }
        }
    }
    return true;
}

}  // namespace cuda_host
