// Rows of tokens to rows of experts and back: gather, combine and their gradients, as `moses.ops` defines them.
//
// A block takes rows in turn, its threads the row's packs: 16 bytes each where width and addresses allow, single items elsewhere. A token gathers
// its rows itself, in slot order, so nothing is added by two threads and no atomics are needed: results have the same bits for any grid. Sums are
// in float (double for double); a product is rounded before it is added (compiled without fused multiply-add), and the sum is rounded once.

typedef long long int64;
typedef unsigned short uint16;
typedef unsigned int uint32;

struct bfloat16 { uint16 bits; };
struct float16 { uint16 bits; };

#ifndef MOSES_HOST
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

template <typename T> struct Sum { typedef float type; };
template <> struct Sum<double> { typedef double type; };

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(bfloat16 value) { return bits_to_float((uint32)value.bits << 16); }
__device__ inline float widen(float16 value) { return half_to_float(value.bits); }

__device__ inline void narrow(float value, float& into) { into = value; }
__device__ inline void narrow(double value, double& into) { into = value; }
__device__ inline void narrow(float value, float16& into) { into.bits = float_to_half(value); }
__device__ inline void narrow(float value, bfloat16& into) {
    // to nearest, ties to even; a NaN stays one
    uint32 bits = float_to_bits(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    into.bits = (uint16)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T items[N]; };

// out[j] = x[order[j] / top_k], zeros where order[j] is -1; rows are `units` units of copying.
template <typename Unit, typename Index>
__device__ void copy_rows(const Unit* x, const Index* order, int64 rows, int64 units, int64 top_k, Unit* out) {
    for (int64 row = blockIdx.x; row < rows; row += gridDim.x) {
        int64 pair = (int64)order[row];
        const Unit* source = x + (pair < 0 ? 0 : pair / top_k) * units;
        for (int64 unit = threadIdx.x; unit < units; unit += blockDim.x) {
            out[row * units + unit] = pair < 0 ? Unit() : source[unit];
        }
    }
}

// out[t] = sum over slots s of weights[t, s] * y[inverse[t, s]]; without weights each is 1.
template <typename T, int N, typename Index>
__device__ void sum_rows(const T* y, const Index* inverse, const typename Sum<T>::type* weights, int64 tokens, int64 width, int64 top_k, T* out) {
    typedef typename Sum<T>::type S;
    int64 packs = width / N;
    for (int64 token = blockIdx.x; token < tokens; token += gridDim.x) {
        for (int64 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
            S sums[N];
            for (int item = 0; item < N; ++item) sums[item] = 0;
            for (int64 slot = 0; slot < top_k; ++slot) {
                int64 pair = token * top_k + slot;
                int64 row = (int64)inverse[pair];
                if (row < 0) continue;
                S weight = weights ? weights[pair] : (S)1;
                Pack<T, N> part = reinterpret_cast<const Pack<T, N>*>(y + row * width)[pack];
                for (int item = 0; item < N; ++item) sums[item] = sums[item] + weight * widen(part.items[item]);
            }
            Pack<T, N> result;
            for (int item = 0; item < N; ++item) narrow(sums[item], result.items[item]);
            reinterpret_cast<Pack<T, N>*>(out + token * width)[pack] = result;
        }
    }
}

// out[j] = weights[order[j]] * grad[order[j] / top_k], zeros where order[j] is -1.
template <typename T, int N, typename Index>
__device__ void scale_rows(const T* grad, const Index* order, const typename Sum<T>::type* weights, int64 rows, int64 width, int64 top_k, T* out) {
    typedef typename Sum<T>::type S;
    int64 packs = width / N;
    for (int64 row = blockIdx.x; row < rows; row += gridDim.x) {
        int64 pair = (int64)order[row];
        S weight = pair < 0 ? (S)0 : weights[pair];
        const Pack<T, N>* source = reinterpret_cast<const Pack<T, N>*>(grad + (pair < 0 ? 0 : pair / top_k) * width);
        for (int64 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
            Pack<T, N> result = Pack<T, N>();
            if (pair >= 0) {
                Pack<T, N> part = source[pack];
                for (int item = 0; item < N; ++item) narrow(weight * widen(part.items[item]), result.items[item]);
            }
            reinterpret_cast<Pack<T, N>*>(out + row * width)[pack] = result;
        }
    }
}

// lanes[pair, l] = sum over d = l, l + 32, ... of grad[token, d] * y[inverse[pair], d]; 0 where dropped. The lanes are folded outside.
template <typename T, typename Index>
__device__ void dot_lanes(const T* grad, const T* y, const Index* inverse, int64 pairs, int64 width, int64 top_k, typename Sum<T>::type* lanes) {
    typedef typename Sum<T>::type S;
    int64 count = pairs * 32;
    for (int64 place = blockIdx.x * (int64)blockDim.x + threadIdx.x; place < count; place += (int64)gridDim.x * blockDim.x) {
        int64 pair = place / 32;
        int64 row = (int64)inverse[pair];
        S sum = 0;
        if (row >= 0) {
            const T* left = grad + pair / top_k * width;
            const T* right = y + row * width;
            for (int64 d = place % 32; d < width; d += 32) sum = sum + widen(left[d]) * widen(right[d]);
        }
        lanes[place] = sum;
    }
}

#define COPY(NAME, UNIT, INDEX_NAME, INDEX)                                                                                              \
    extern "C" __global__ void gather_##NAME##_##INDEX_NAME(const UNIT* x, const INDEX* order, int64 rows, int64 units, int64 top_k,      \
                                                            UNIT* out) {                                                                 \
        copy_rows<UNIT, INDEX>(x, order, rows, units, top_k, out);                                                                       \
    }
#define ROWS(NAME, T, N, INDEX_NAME, INDEX)                                                                                              \
    extern "C" __global__ void combine_##NAME##_x##N##_##INDEX_NAME(const T* y, const INDEX* inverse, const Sum<T>::type* weights,        \
                                                                    int64 tokens, int64 width, int64 top_k, T* out) {                    \
        sum_rows<T, N, INDEX>(y, inverse, weights, tokens, width, top_k, out);                                                           \
    }                                                                                                                                    \
    extern "C" __global__ void scale_##NAME##_x##N##_##INDEX_NAME(const T* grad, const INDEX* order, const Sum<T>::type* weights,         \
                                                                  int64 rows, int64 width, int64 top_k, T* out) {                        \
        scale_rows<T, N, INDEX>(grad, order, weights, rows, width, top_k, out);                                                          \
    }
#define LANES(NAME, T, INDEX_NAME, INDEX)                                                                                                \
    extern "C" __global__ void lanes_##NAME##_##INDEX_NAME(const T* grad, const T* y, const INDEX* inverse, int64 pairs, int64 width,     \
                                                           int64 top_k, Sum<T>::type* lanes) {                                           \
        dot_lanes<T, INDEX>(grad, y, inverse, pairs, width, top_k, lanes);                                                               \
    }

typedef Pack<uint32, 4> unit16;
typedef Pack<uint32, 1> unit4;

#define INDEXED(INDEX_NAME, INDEX)                                                                                                       \
    COPY(16, unit16, INDEX_NAME, INDEX)                                                                                                  \
    COPY(4, unit4, INDEX_NAME, INDEX)                                                                                                    \
    COPY(2, uint16, INDEX_NAME, INDEX)                                                                                                   \
    ROWS(float32, float, 4, INDEX_NAME, INDEX)                                                                                           \
    ROWS(float32, float, 1, INDEX_NAME, INDEX)                                                                                           \
    ROWS(float64, double, 2, INDEX_NAME, INDEX)                                                                                          \
    ROWS(float64, double, 1, INDEX_NAME, INDEX)                                                                                          \
    ROWS(bfloat16, bfloat16, 8, INDEX_NAME, INDEX)                                                                                       \
    ROWS(bfloat16, bfloat16, 1, INDEX_NAME, INDEX)                                                                                       \
    ROWS(float16, float16, 8, INDEX_NAME, INDEX)                                                                                         \
    ROWS(float16, float16, 1, INDEX_NAME, INDEX)                                                                                         \
    LANES(float32, float, INDEX_NAME, INDEX)                                                                                             \
    LANES(float64, double, INDEX_NAME, INDEX)                                                                                            \
    LANES(bfloat16, bfloat16, INDEX_NAME, INDEX)                                                                                         \
    LANES(float16, float16, INDEX_NAME, INDEX)

INDEXED(int32, int)
INDEXED(int64, int64)
