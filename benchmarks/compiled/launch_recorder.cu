// Linked before the CUDA runtime by benchmarks/compiled/cuda_report.py. After record_launches(), launches are written down instead
// of made, so that the shared memory that each one asks for is known without a GPU. The linker's --wrap gives each
// function of the runtime the name __real_... and calls __wrap_... in its place.
#include <cuda_runtime.h>

#include <map>
#include <string>

namespace {
bool recording = false;
std::string record;

std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> kernels;  // made by the first registration, before all else
    return kernels;
}

cudaError_t write_down(const void* kernel, size_t shared) {
    record += names().at(kernel) + " " + std::to_string(shared) + "\n";
    return cudaSuccess;
}
}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// To be called before the first launch of the process.
EXPORT void record_launches() { recording = true; }
// A line for each launch: mangled name, bytes of dynamic shared memory.
EXPORT const char* recorded_launches() { return record.c_str(); }

void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
void __wrap___cudaRegisterFunction(void** module, const char* host, char* device, const char* name, int limit,
                                   uint3* thread, uint3* block, dim3* threads, dim3* blocks, int* warp) {
    names()[host] = name;
    __real___cudaRegisterFunction(module, host, device, name, limit, thread, block, threads, blocks, warp);
}

cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    return recording ? cudaSuccess : __real_cudaFuncSetAttribute(kernel, attribute, value);
}

cudaError_t __real_cudaGetLastError();
cudaError_t __wrap_cudaGetLastError() { return recording ? cudaSuccess : __real_cudaGetLastError(); }

#if CUDART_VERSION >= 13000  // launches by a handle; while recording, it is the kernel itself
cudaError_t __real___cudaGetKernel(cudaKernel_t*, const void*);
cudaError_t __wrap___cudaGetKernel(cudaKernel_t* handle, const void* kernel) {
    if (!recording) return __real___cudaGetKernel(handle, kernel);
    *handle = static_cast<cudaKernel_t>(const_cast<void*>(kernel));
    return cudaSuccess;
}

cudaError_t __real___cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t __wrap___cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t stream) {
    return recording ? write_down(handle, shared)
                     : __real___cudaLaunchKernel(handle, grid, block, arguments, shared, stream);
}
#else
cudaError_t __real_cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t __wrap_cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t stream) {
    return recording ? write_down(kernel, shared)
                     : __real_cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
#endif

}  // extern "C"
