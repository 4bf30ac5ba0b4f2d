#include <cuda_runtime.h>

#include "genft.h"

namespace genft {

const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int thin_product(const void* const* , int64_t , bool , const void* , const void* ,
                 void* , void* , int , int , int , int , int , int , void* ) { return cudaErrorNotSupported; }

int thin_transposed(const void* , const void* , const void* const* , int64_t , bool ,
                    float* , int , int , int , int , int , int , int ,
                    void* ) { return cudaErrorNotSupported; }

}  // namespace genft
