#include <cuda_runtime.h>

#include "genft.h"

namespace genft {

int extended_k(const void* , int64_t , const void* , int64_t , bool ,
               const void* , const void* , const void* , void* , int , int , int , int ,
               float , int , void* ) { return cudaErrorNotSupported; }

int main_loop(const void* , int64_t , const void* , int64_t , bool ,
              const void* , const void* , const void* , const int64_t* , void* , int , int ,
              int , int , bool , uint32_t , float , uint32_t ,
              float , int , int , void* ) { return cudaErrorNotSupported; }

}  // namespace genft
