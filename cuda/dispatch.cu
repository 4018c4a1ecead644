// The dispatch plan: a stable counting sort of routed pairs by expert, without atomics and without synchronisation.
//
// Pairs go in chunks, a chunk to a thread. `plan_count` counts a chunk's ids; torch scans the counts, by expert and then chunk, into each chunk's
// first ranks; `plan_place` gives the pairs their rows in order. The result is the same for any grid. Tables are (E, chunks): threads beside each
// other, which are chunks beside each other, then touch numbers beside each other.

typedef long long int64;

// What an id out of range does: on the device a trap, which is an asynchronous error of the stream.
#ifndef MOSES_HOST
#define MOSES_FAIL() __trap()
#endif

extern "C" __global__ void plan_count(const int64* ids, int64 pairs, int64 num_experts, int64 chunk, int64 chunks, int* counts) {
    for (int64 part = blockIdx.x * (int64)blockDim.x + threadIdx.x; part < chunks; part += (int64)gridDim.x * blockDim.x) {
        int64 end = (part + 1) * chunk < pairs ? (part + 1) * chunk : pairs;
        for (int64 pair = part * chunk; pair < end; ++pair) {
            int64 id = ids[pair];
            if (id < 0 || id >= num_experts) {
                MOSES_FAIL();
                return;
            }
            counts[id * chunks + part] += 1;
        }
    }
}

// `ranks` (E, chunks): pairs of all experts before this chunk's of this expert; `starts` (E): those before the expert's first. They are counted on here.
template <typename Index>
__device__ void place(const int64* ids, int64 pairs, int64 chunk, int64 chunks, int64* ranks, const int64* starts, const int64* offsets,
                      int64 capacity, Index* order, Index* inverse) {
    for (int64 part = blockIdx.x * (int64)blockDim.x + threadIdx.x; part < chunks; part += (int64)gridDim.x * blockDim.x) {
        int64 end = (part + 1) * chunk < pairs ? (part + 1) * chunk : pairs;
        for (int64 pair = part * chunk; pair < end; ++pair) {
            int64 id = ids[pair];
            int64 rank = ranks[id * chunks + part]++ - starts[id];
            if (rank < capacity) {
                int64 row = offsets[id] + rank;
                order[row] = (Index)pair;
                inverse[pair] = (Index)row;
            } else {
                inverse[pair] = (Index)-1;
            }
        }
    }
}

extern "C" __global__ void plan_place_int32(const int64* ids, int64 pairs, int64 chunk, int64 chunks, int64* ranks, const int64* starts,
                                            const int64* offsets, int64 capacity, int* order, int* inverse) {
    place<int>(ids, pairs, chunk, chunks, ranks, starts, offsets, capacity, order, inverse);
}

extern "C" __global__ void plan_place_int64(const int64* ids, int64 pairs, int64 chunk, int64 chunks, int64* ranks, const int64* starts,
                                            const int64* offsets, int64 capacity, int64* order, int64* inverse) {
    place<int64>(ids, pairs, chunk, chunks, ranks, starts, offsets, capacity, order, inverse);
}
