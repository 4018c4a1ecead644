// What every source begins with: sizes of 64 bits, and what a kernel does that is given an index out of range.
//
// The host's compiler takes the same text: a shim then defines MOSES_HOST, the places of a thread, and what is between #ifndef and #endif here.

typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;

#ifndef MOSES_HOST
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned int line, const char* function, decltype(sizeof(0)) size);

// An asynchronous error of the device, as by assert(): the message goes to stderr and every later call of CUDA fails.
__device__ inline void refuse(const char* message) { __assertfail(message, "moses", 0, "kernel", 1); }

__device__ inline float bits_to_float(uint32 bits) { return __uint_as_float(bits); }
__device__ inline uint32 float_to_bits(float value) { return __float_as_uint(value); }
__device__ inline float half_to_float(uint16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline uint16 float_to_half(float value) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
