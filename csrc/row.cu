#include <cuda_runtime.h>

#include "genft.h"

namespace genft {

int row_forward(const void* , const void* , const void* , const void* , const int64_t* , void* ,
                void* , int , int , int , int , int , uint32_t , float ,
                int , int , int , void* ) { return cudaErrorNotSupported; }

int row_backward_out(const void* , const void* , const void* , const void* , const int64_t* ,
                     void* , void* , int , int , int , int , int , uint32_t ,
                     float , int , int , void* ) { return cudaErrorNotSupported; }

int row_backward_in(const void* , const void* , const void* , const void* , const int64_t* ,
                    void* , int , int , int , int , int , uint32_t , float ,
                    int , int , void* ) { return cudaErrorNotSupported; }

}  // namespace genft
