// Runs the CUDA sources on the host: a kernel is called once a thread, with the places that `moses_run` sets.
#define MOSES_HOST
#define __global__
#define __device__
#include <cstring>

struct Place { long long x, y; };
static Place blockIdx, threadIdx, blockDim, gridDim;
static const char* moses_refused = nullptr;
static inline void refuse(const char* message) { moses_refused = message; }

static inline float bits_to_float(unsigned int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static inline unsigned int float_to_bits(float value) { unsigned int bits; std::memcpy(&bits, &value, 4); return bits; }
static inline float half_to_float(unsigned short bits) { _Float16 value; std::memcpy(&value, &bits, 2); return (float)value; }
static inline unsigned short float_to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

// Calls `kernel` for every thread in `order`, numbered (block, y, x). Pointers and 64-bit integers go the same way to a function, so that any kernel
// can be called with as many arguments as the longest one has. Returns what a thread refused with, or null.
typedef long long Word;
extern "C" const char* moses_run(void* kernel, const Word* a, const Word* order, Word blocks, Word x, Word y) {
    typedef void (*Kernel)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);
    moses_refused = nullptr;
    gridDim = {blocks, 1}, blockDim = {x, y};
    for (Word thread = 0; thread < blocks * x * y; ++thread) {
        const Word place = order[thread];
        blockIdx = {place / (x * y), 0}, threadIdx = {place % x, place / x % y};
        ((Kernel)kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12]);
    }
    return moses_refused;
}
