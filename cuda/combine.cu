// Rows of tokens to rows of experts and back: gather, combine and their gradients, as `moses.ops` defines them.
//
// Blocks are two-dimensional: a block takes blockDim.y rows at a time, blockDim.x threads a row, and a thread packs of 16 bytes where width and
// addresses allow, smaller ones elsewhere. A token gathers its rows itself, in slot order, so nothing is added by two threads and no atomics are needed:
// results have the same bits for any grid and alignment. Sums are in float (double for double); a product is rounded before it is added (compiled
// without fused multiply-add), and the sum is rounded once. A negative index is an empty row or a dropped pair.

struct bfloat16 { uint16 bits; };
struct float16 { uint16 bits; };

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

template <typename T, int N> struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack { T items[N]; };

__device__ inline int64 first_row() { return blockIdx.x * (int64)blockDim.y + threadIdx.y; }
__device__ inline int64 next_rows() { return (int64)gridDim.x * blockDim.y; }

// out[j] = x[order[j] / top_k], zeros where order[j] is empty. Rows are `units` units of copying, those of x `stride` units apart.
template <typename Unit, typename Index>
__device__ void copy_rows(const Unit* __restrict__ x, const Index* __restrict__ order, int64 rows, int64 pairs, int64 units, int64 stride,
                          int64 top_k, Unit* __restrict__ out) {
    for (int64 row = first_row(); row < rows; row += next_rows()) {
        const int64 pair = (int64)order[row];
        if (pair >= pairs) {
            refuse("moses.ops.gather: the plan's order is out of range");
            return;
        }
        const Unit* source = x + (pair < 0 ? 0 : pair / top_k) * stride;
        Unit* target = out + row * units;
        for (int64 unit = threadIdx.x; unit < units; unit += blockDim.x) target[unit] = pair < 0 ? Unit() : source[unit];
    }
}

// out[t] = sum over slots s of weights[t, s] * y[inverse[t, s]]; without weights each is 1.
template <typename T, int N, typename Index>
__device__ void sum_rows(const T* __restrict__ y, const Index* __restrict__ inverse, const typename Sum<T>::type* __restrict__ weights,
                         int64 tokens, int64 rows, int64 width, int64 top_k, T* __restrict__ out) {
    typedef typename Sum<T>::type S;
    const int64 packs = width / N;
    for (int64 token = first_row(); token < tokens; token += next_rows()) {
        for (int64 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
            S sums[N];
            for (int item = 0; item < N; ++item) sums[item] = 0;
            for (int64 pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
                const int64 row = (int64)inverse[pair];
                if (row < 0) continue;
                if (row >= rows) {
                    refuse("moses.ops.combine: the plan's inverse is out of range");
                    return;
                }
                const S weight = weights ? weights[pair] : (S)1;
                const Pack<T, N> part = reinterpret_cast<const Pack<T, N>*>(y + row * width)[pack];
                for (int item = 0; item < N; ++item) sums[item] = sums[item] + weight * widen(part.items[item]);
            }
            Pack<T, N> result;
            for (int item = 0; item < N; ++item) narrow(sums[item], result.items[item]);
            reinterpret_cast<Pack<T, N>*>(out + token * width)[pack] = result;
        }
    }
}

// out[j] = weights[order[j]] * grad[order[j] / top_k], zeros where order[j] is empty.
template <typename T, int N, typename Index>
__device__ void scale_rows(const T* __restrict__ grad, const Index* __restrict__ order, const typename Sum<T>::type* __restrict__ weights,
                           int64 rows, int64 pairs, int64 width, int64 top_k, T* __restrict__ out) {
    typedef typename Sum<T>::type S;
    const int64 packs = width / N;
    for (int64 row = first_row(); row < rows; row += next_rows()) {
        const int64 pair = (int64)order[row];
        if (pair >= pairs) {
            refuse("moses.ops.combine: the plan's order is out of range");
            return;
        }
        const S weight = pair < 0 ? (S)0 : weights[pair];
        const Pack<T, N>* source = reinterpret_cast<const Pack<T, N>*>(grad + (pair < 0 ? 0 : pair / top_k) * width);
        Pack<T, N>* target = reinterpret_cast<Pack<T, N>*>(out + row * width);
        for (int64 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
            Pack<T, N> result = Pack<T, N>();
            if (pair >= 0) {
                const Pack<T, N> part = source[pack];
                for (int item = 0; item < N; ++item) narrow(weight * widen(part.items[item]), result.items[item]);
            }
            target[pack] = result;
        }
    }
}

// lanes[pair, l] = sum over d = l, l + LANES, ... of grad[token, d] * y[inverse[pair], d], 0 where dropped. A thread has N lanes beside each other.
const int LANES = 32;

template <typename T, int N, typename Index>
__device__ void dot_lanes(const T* __restrict__ grad, const T* __restrict__ y, const Index* __restrict__ inverse, int64 pairs, int64 rows,
                          int64 width, int64 top_k, typename Sum<T>::type* __restrict__ lanes) {
    typedef typename Sum<T>::type S;
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 place = blockIdx.x * (int64)blockDim.x + threadIdx.x; place < pairs * (LANES / N); place += step) {
        const int64 pair = place / (LANES / N);
        const int lane = (int)(place % (LANES / N)) * N;
        const int64 row = (int64)inverse[pair];
        Pack<S, N> sums;
        for (int item = 0; item < N; ++item) sums.items[item] = 0;
        if (row >= rows) {
            refuse("moses.ops.combine: the plan's inverse is out of range");
            return;
        }
        if (row >= 0) {
            const T* left = grad + pair / top_k * width;
            const T* right = y + row * width;
            for (int64 d = lane; d < width; d += LANES) {
                const Pack<T, N> one = *reinterpret_cast<const Pack<T, N>*>(left + d);
                const Pack<T, N> other = *reinterpret_cast<const Pack<T, N>*>(right + d);
                for (int item = 0; item < N; ++item) {
                    sums.items[item] = sums.items[item] + widen(one.items[item]) * widen(other.items[item]);
                }
            }
        }
        reinterpret_cast<Pack<S, N>*>(lanes)[place] = sums;
    }
}

// out[pair] = the pair's lanes, added by halves.
template <typename S>
__device__ void fold_lanes(const S* __restrict__ lanes, int64 pairs, S* __restrict__ out) {
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 pair = blockIdx.x * (int64)blockDim.x + threadIdx.x; pair < pairs; pair += step) {
        Pack<S, LANES> sums = reinterpret_cast<const Pack<S, LANES>*>(lanes)[pair];
        for (int half = LANES / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) sums.items[lane] = sums.items[lane] + sums.items[lane + half];
        }
        out[pair] = sums.items[0];
    }
}

#define COPY(NAME, UNIT, INDEX_NAME, INDEX)                                                                                              \
    extern "C" __global__ void gather_##NAME##_##INDEX_NAME(const UNIT* x, const INDEX* order, int64 rows, int64 pairs, int64 units,      \
                                                            int64 stride, int64 top_k, UNIT* out) {                                      \
        copy_rows<UNIT, INDEX>(x, order, rows, pairs, units, stride, top_k, out);                                                        \
    }
#define ROWS(NAME, T, N, INDEX_NAME, INDEX)                                                                                              \
    extern "C" __global__ void combine_##NAME##_x##N##_##INDEX_NAME(const T* y, const INDEX* inverse, const Sum<T>::type* weights,        \
                                                                    int64 tokens, int64 rows, int64 width, int64 top_k, T* out) {        \
        sum_rows<T, N, INDEX>(y, inverse, weights, tokens, rows, width, top_k, out);                                                     \
    }                                                                                                                                    \
    extern "C" __global__ void scale_##NAME##_x##N##_##INDEX_NAME(const T* grad, const INDEX* order, const Sum<T>::type* weights,         \
                                                                  int64 rows, int64 pairs, int64 width, int64 top_k, T* out) {           \
        scale_rows<T, N, INDEX>(grad, order, weights, rows, pairs, width, top_k, out);                                                   \
    }                                                                                                                                    \
    extern "C" __global__ void dot_##NAME##_x##N##_##INDEX_NAME(const T* grad, const T* y, const INDEX* inverse, int64 pairs, int64 rows, \
                                                                int64 width, int64 top_k, Sum<T>::type* lanes) {                         \
        dot_lanes<T, N, INDEX>(grad, y, inverse, pairs, rows, width, top_k, lanes);                                                      \
    }

typedef Pack<uint32, 4> unit16;
typedef Pack<uint32, 2> unit8;

#define INDEXED(INDEX_NAME, INDEX)                                                                                                       \
    COPY(16, unit16, INDEX_NAME, INDEX)                                                                                                  \
    COPY(8, unit8, INDEX_NAME, INDEX)                                                                                                    \
    COPY(4, uint32, INDEX_NAME, INDEX)                                                                                                   \
    COPY(2, uint16, INDEX_NAME, INDEX)                                                                                                   \
    ROWS(float32, float, 4, INDEX_NAME, INDEX)                                                                                           \
    ROWS(float32, float, 1, INDEX_NAME, INDEX)                                                                                           \
    ROWS(float64, double, 2, INDEX_NAME, INDEX)                                                                                          \
    ROWS(float64, double, 1, INDEX_NAME, INDEX)                                                                                          \
    ROWS(bfloat16, bfloat16, 8, INDEX_NAME, INDEX)                                                                                       \
    ROWS(bfloat16, bfloat16, 1, INDEX_NAME, INDEX)                                                                                       \
    ROWS(float16, float16, 8, INDEX_NAME, INDEX)                                                                                         \
    ROWS(float16, float16, 1, INDEX_NAME, INDEX)

INDEXED(int32, int)
INDEXED(int64, int64)

extern "C" __global__ void fold_float32(const float* lanes, int64 pairs, float* out) { fold_lanes<float>(lanes, pairs, out); }
extern "C" __global__ void fold_float64(const double* lanes, int64 pairs, double* out) { fold_lanes<double>(lanes, pairs, out); }
