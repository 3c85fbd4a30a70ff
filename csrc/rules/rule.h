// How a rule is declared: inlined into CPU loops and CUDA kernels alike.
#pragma once

#if defined(__CUDACC__)
#define SK_RULE __host__ __device__ __forceinline__
#else
#define SK_RULE inline __attribute__((always_inline))
#endif
