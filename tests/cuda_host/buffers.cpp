// For Python, by ctypes: which global memory the next launches may touch.
#include "memory.h"

extern "C" void cuda_host_register_buffer(uintptr_t address, size_t bytes) {
    cuda_host::buffers.push_back({address, address + bytes});
}

extern "C" void cuda_host_forget_buffers() { cuda_host::buffers.clear(); }
