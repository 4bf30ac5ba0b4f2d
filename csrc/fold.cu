#include <cuda_runtime.h>

#include "genft.h"

namespace genft {

int fold(const void* , int64_t , bool , const void* , const void* , const int64_t* ,
         void* , int , int , int , uint32_t , float , uint32_t ,
         float , int , int , void* ) { return cudaErrorNotSupported; }

}  // namespace genft
