// Kernels that keep a cache of blocks: new keys and values go to their places, blocks are copied.
//
// A plane is the keys or the values of one layer, a pool [blocks, heads, tokens of a block, head size]. Elements are
// moved as vectors of 16, 4 or 2 bytes, whatever their type is; `vectors` of them make one head of one token.
// tools/dev/make_ptx.sh makes cache_kernels.ptx of this file.

struct WritePlane {
    const void *source;  // [rows, tokens, heads, head size]
    void *pool;
    long long heads, vectors, group;
};

struct CopyPlane {
    void *pool;  // blocks 0 .. num_blocks - 1
    void *host;  // the blocks behind them, in pinned memory of the host
    long long heads, vectors, group;
};

struct BlockCopy {
    int group, source, destination, num_tokens;
};

// One thread block for each token of each plane. `blocks` [groups, rows, columns] names the blocks of a row's new
// tokens, from the one that its first new token lies in. Tokens of the block `nowhere` are dropped: padding rows have it.
// Whoever begins a block clears what follows in it, so that a sequence never sees what another one left there.
template <typename Vector>
__device__ void write_tokens(const WritePlane *planes, const int *past_lengths, const int *lengths, const int *blocks,
                             int rows, int tokens, int columns, int tokens_per_block, int nowhere) {
    const WritePlane plane = planes[blockIdx.y];
    const int row = blockIdx.x / tokens, offset = blockIdx.x % tokens;
    const int length = lengths[row], past = past_lengths[row];
    if (offset >= length) return;
    const int position = past + offset, place = position % tokens_per_block;
    const int column = position / tokens_per_block - past / tokens_per_block;
    const int block = blocks[((int)plane.group * rows + row) * columns + column];
    if (block == nowhere) return;
    const int heads = (int)plane.heads, vectors = (int)plane.vectors;
    const Vector *source = (const Vector *)plane.source + (long long)blockIdx.x * heads * vectors;
    Vector *target = (Vector *)plane.pool + (long long)block * heads * tokens_per_block * vectors;
    for (int i = threadIdx.x; i < heads * vectors; i += blockDim.x) {
        const int head = i / vectors, vector = i % vectors;
        target[(long long)(head * tokens_per_block + place) * vectors + vector] = source[i];
    }
    if (offset + 1 < length || position - place < past) return;
    const int rest = (tokens_per_block - place - 1) * vectors;
    for (int i = threadIdx.x; i < heads * rest; i += blockDim.x) {
        const int head = i / rest, behind = i % rest;
        target[(long long)(head * tokens_per_block + place + 1) * vectors + behind] = Vector{};
    }
}

template <typename Vector>
__device__ Vector *block_of(const CopyPlane &plane, int block, int num_blocks, long long size) {
    if (block < num_blocks) return (Vector *)plane.pool + block * size;
    return (Vector *)plane.host + (block - num_blocks) * size;
}

// One thread block for each copy of each plane. No copy reads or writes what another one writes.
template <typename Vector>
__device__ void copy_blocks(const CopyPlane *planes, const BlockCopy *copies, int num_blocks, int tokens_per_block) {
    const CopyPlane plane = planes[blockIdx.y];
    const BlockCopy copy = copies[blockIdx.x];
    if (copy.group != plane.group) return;
    const int heads = (int)plane.heads, vectors = (int)plane.vectors;
    const long long size = (long long)heads * tokens_per_block * vectors;
    const Vector *source = block_of<Vector>(plane, copy.source, num_blocks, size);
    Vector *target = block_of<Vector>(plane, copy.destination, num_blocks, size);
    const int run = copy.num_tokens * vectors;
    for (int i = threadIdx.x; i < heads * run; i += blockDim.x) {
        const long long place = (long long)(i / run) * tokens_per_block * vectors + i % run;
        target[place] = source[place];
    }
}

#define TRTLLM_KERNELS(width, Vector)                                                                                 \
    extern "C" __global__ void write_tokens_##width(const WritePlane *planes, const int *past_lengths,                \
                                                    const int *lengths, const int *blocks, int rows, int tokens,      \
                                                    int columns, int tokens_per_block, int nowhere) {                 \
        write_tokens<Vector>(planes, past_lengths, lengths, blocks, rows, tokens, columns, tokens_per_block, nowhere); \
    }                                                                                                                 \
    extern "C" __global__ void copy_blocks_##width(const CopyPlane *planes, const BlockCopy *copies, int num_blocks,   \
                                                   int tokens_per_block) {                                            \
        copy_blocks<Vector>(planes, copies, num_blocks, tokens_per_block);                                            \
    }

TRTLLM_KERNELS(16, int4)
TRTLLM_KERNELS(4, int)
TRTLLM_KERNELS(2, short)
