// Kernels of a warp or two, each with one fault to be noticed by tests/cuda_host: tests/backends/test_cuda_host.py.
#include "device.cuh"

namespace {

enum Fault {
    kNone,
    kReadOutside,
    kWriteOutside,
    kCopyOutside,
    kCopyUnaligned,
    kCopyNotWaitedFor,
    kReadBeforeTheWait,
    kReadBeforeTheBarrier,
    kUnevenBarrier,
    kUnevenCollective,
    kOtherCollective,
    kOutsideSharedMemory,
};

struct Shared {
    alignas(16) float value[64];
};

// out [64] = in [64], by way of shared memory and of the neighbour in the other warp.
__global__ void copy(int fault, const float* in, float* out) {
    auto& shared = genft::shared_memory<Shared>();
    const int i = threadIdx.x, other = (i + 32) % 64;
    uint32_t matrices[4];
    if (i % 4 == 0) {
        genft::copy_16_bytes_async(shared.value + i, in + i + (fault == kCopyOutside ? 64 : fault == kCopyUnaligned));
        genft::commit_copies();
        if (fault == kReadBeforeTheWait) out[i] = shared.value[i];
        if (fault != kCopyNotWaitedFor) genft::wait_for_copies<0>();
    }
    if (fault == kReadBeforeTheBarrier) out[other] = shared.value[other];
    if (fault != kUnevenBarrier || i < 32) __syncthreads();
    if (fault == kOutsideSharedMemory && i == 0) shared.value[64] = 0.0f;
    if (fault == kUnevenCollective && i != 5) genft::load_matrices<false>(matrices, shared.value);
    if (fault == kOtherCollective) {
        if (i % 2 == 0) {
            genft::load_matrices<true>(matrices, shared.value);
        } else {
            genft::load_matrices<false>(matrices, shared.value);
        }
    }
    if (fault != kReadBeforeTheWait && fault != kReadBeforeTheBarrier) {
        genft::write(out + other + (fault == kWriteOutside ? 1 : 0), shared.value[other]);
    }
    if (fault == kReadOutside) genft::read(in + 64);
}

}  // namespace

extern "C" int run_with_fault(int fault, const float* in, float* out) {
    return genft::launch<Shared>(copy, dim3(2), 64, nullptr, fault, in, out);
}

extern "C" const char* reason(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
