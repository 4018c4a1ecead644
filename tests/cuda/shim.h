// Runs the CUDA sources on the host: a kernel is called once a block and thread, with the numbers that `moses_place` sets.
#define MOSES_HOST
#define __global__
#define __device__
#include <cstring>

struct Place { long long x; };
static Place blockIdx, threadIdx, blockDim, gridDim;
static int moses_failed_flag = 0;
#define MOSES_FAIL() (moses_failed_flag = 1)

extern "C" void moses_place(long long block, long long thread, long long blocks, long long threads) {
    blockIdx.x = block, threadIdx.x = thread, gridDim.x = blocks, blockDim.x = threads;
}
extern "C" int moses_failed() {
    int failed = moses_failed_flag;
    moses_failed_flag = 0;
    return failed;
}

static inline float bits_to_float(unsigned int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static inline unsigned int float_to_bits(float value) { unsigned int bits; std::memcpy(&bits, &value, 4); return bits; }
static inline float half_to_float(unsigned short bits) { _Float16 value; std::memcpy(&value, &bits, 2); return (float)value; }
static inline unsigned short float_to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
