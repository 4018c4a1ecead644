// The dispatch plan: a stable radix sort of routed pairs by expert, without atomics and without synchronisation of threads.
//
// A pass sorts by one digit of the id; up to 256 experts need one. Pairs go in chunks of at most 256, a thread a pair: `plan_rank` counts the
// pairs of the same digit before it in its chunk, and the last pair of a digit knows how many its chunk has. Torch scans that table, by digit and
// then chunk, and `plan_move` (`plan_place` where the first pass is the last) puts the pairs where they belong. Nothing depends on the grid, and a
// chunk's ids, which its threads read together, stay in the first cache.

// ranks[i] = pairs before pair i, in its chunk, whose digit is the same; table[digit, chunk] = pairs of that digit. The table is zero before.
template <typename Key>
__device__ void rank(const Key* __restrict__ keys, int64 pairs, int64 num_experts, int64 shift, int64 digits, int64 chunk_bits, int64 chunks,
                     uint8* ranks, int* table) {
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 pair = blockIdx.x * (int64)blockDim.x + threadIdx.x; pair < pairs; pair += step) {
        const Key key = keys[pair];
        if (key < 0 || key >= num_experts) {
            refuse("moses.dispatch_plan: an expert id is not in [0, num_experts)");
            return;
        }
        const int64 chunk = pair >> chunk_bits;
        const int64 first = chunk << chunk_bits;
        const int place = (int)(pair - first);
        const int length = (int)((pairs - first) >> chunk_bits ? (int64)1 << chunk_bits : pairs - first);
        const int digit = (int)((key >> shift) & (digits - 1));
        int before = 0, after = 0;
        for (int other = 0; other < length; ++other) {
            const bool same = (int)((keys[first + other] >> shift) & (digits - 1)) == digit;
            before += same && other < place;
            after += same && other > place;
        }
        ranks[pair] = (uint8)before;
        if (after == 0) table[digit * chunks + chunk] = before + 1;
    }
}

// Where a pair comes in the order of its digit: `scan` is the inclusive sum of `table`, by digit and then chunk.
template <typename Key>
__device__ inline int64 position(Key key, int64 pair, int64 shift, int64 digits, int64 chunk_bits, int64 chunks, const uint8* ranks,
                                 const int* table, const int64* scan) {
    const int64 entry = ((key >> shift) & (digits - 1)) * chunks + (pair >> chunk_bits);
    return scan[entry] - table[entry] + ranks[pair];
}

// One pass of several: pair i and its key go to their place. Without `pairs_in` pair i is i.
template <typename Key, typename Index>
__device__ void move(const Key* __restrict__ keys, const Index* __restrict__ pairs_in, int64 pairs, int64 shift, int64 digits, int64 chunk_bits,
                     int64 chunks, const uint8* ranks, const int* table, const int64* scan, int* keys_out, Index* pairs_out) {
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 pair = blockIdx.x * (int64)blockDim.x + threadIdx.x; pair < pairs; pair += step) {
        const Key key = keys[pair];
        const int64 to = position(key, pair, shift, digits, chunk_bits, chunks, ranks, table, scan);
        keys_out[to] = (int)key;
        pairs_out[to] = pairs_in ? pairs_in[pair] : (Index)pair;
    }
}

// The pair that is `to`-th by expert gets its row, or none where its expert is full: `starts` are the pairs, `offsets` the rows of the experts before.
template <typename Index>
__device__ inline void settle(int64 to, int64 expert, Index pair, const int64* starts, const int64* offsets, int64 capacity, Index* order,
                              Index* inverse) {
    const int64 taken = to - starts[expert];
    if (taken < capacity) {
        const int64 row = offsets[expert] + taken;
        order[row] = pair;
        inverse[pair] = (Index)row;
    } else {
        inverse[pair] = (Index)-1;
    }
}

// The plan after a single pass.
template <typename Key, typename Index>
__device__ void place(const Key* __restrict__ keys, int64 pairs, int64 digits, int64 chunk_bits, int64 chunks, const uint8* ranks,
                      const int* table, const int64* scan, const int64* starts, const int64* offsets, int64 capacity, Index* order,
                      Index* inverse) {
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 pair = blockIdx.x * (int64)blockDim.x + threadIdx.x; pair < pairs; pair += step) {
        const Key key = keys[pair];
        const int64 to = position(key, pair, 0, digits, chunk_bits, chunks, ranks, table, scan);
        settle<Index>(to, (int64)key, (Index)pair, starts, offsets, capacity, order, inverse);
    }
}

// The plan after several: keys and pairs are sorted.
template <typename Index>
__device__ void rows(const int* keys, const Index* sorted, int64 pairs, const int64* starts, const int64* offsets, int64 capacity, Index* order,
                     Index* inverse) {
    const int64 step = (int64)gridDim.x * blockDim.x;
    for (int64 to = blockIdx.x * (int64)blockDim.x + threadIdx.x; to < pairs; to += step) {
        settle<Index>(to, keys[to], sorted[to], starts, offsets, capacity, order, inverse);
    }
}

#define KEYED(KEY_NAME, KEY)                                                                                                             \
    extern "C" __global__ void plan_rank_##KEY_NAME(const KEY* keys, int64 pairs, int64 num_experts, int64 shift, int64 digits,           \
                                                    int64 chunk_bits, int64 chunks, uint8* ranks, int* table) {                          \
        rank<KEY>(keys, pairs, num_experts, shift, digits, chunk_bits, chunks, ranks, table);                                            \
    }
#define KEYED_AND_INDEXED(KEY_NAME, KEY, INDEX_NAME, INDEX)                                                                              \
    extern "C" __global__ void plan_move_##KEY_NAME##_##INDEX_NAME(                                                                      \
        const KEY* keys, const INDEX* pairs_in, int64 pairs, int64 shift, int64 digits, int64 chunk_bits, int64 chunks,                  \
        const uint8* ranks, const int* table, const int64* scan, int* keys_out, INDEX* pairs_out) {                                      \
        move<KEY, INDEX>(keys, pairs_in, pairs, shift, digits, chunk_bits, chunks, ranks, table, scan, keys_out, pairs_out);             \
    }                                                                                                                                    \
    extern "C" __global__ void plan_place_##KEY_NAME##_##INDEX_NAME(                                                                     \
        const KEY* keys, int64 pairs, int64 digits, int64 chunk_bits, int64 chunks, const uint8* ranks, const int* table,                \
        const int64* scan, const int64* starts, const int64* offsets, int64 capacity, INDEX* order, INDEX* inverse) {                    \
        place<KEY, INDEX>(keys, pairs, digits, chunk_bits, chunks, ranks, table, scan, starts, offsets, capacity, order, inverse);       \
    }
#define INDEXED(INDEX_NAME, INDEX)                                                                                                       \
    extern "C" __global__ void plan_rows_##INDEX_NAME(const int* keys, const INDEX* sorted, int64 pairs, const int64* starts,             \
                                                      const int64* offsets, int64 capacity, INDEX* order, INDEX* inverse) {              \
        rows<INDEX>(keys, sorted, pairs, starts, offsets, capacity, order, inverse);                                                     \
    }

KEYED(int32, int)
KEYED(int64, int64)
KEYED_AND_INDEXED(int32, int, int32, int)
KEYED_AND_INDEXED(int32, int, int64, int64)
KEYED_AND_INDEXED(int64, int64, int32, int)
KEYED_AND_INDEXED(int64, int64, int64, int64)
INDEXED(int32, int)
INDEXED(int64, int64)
