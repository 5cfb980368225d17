// Sums over rows: of chunks of rows first, then of the chunks, both in a fixed order. And the norms of DoRA.
#include "common.cuh"

BLOCK_KERNEL column_sums(f32* partial, const f32* x, u32 x_stride, u32 rows, u32 width, u32 chunk) {
    SHARED f32 cells[8][33];
    chunk_sums(partial, rows, width, chunk, cells, [&](u64 r, u32 j) { return x[r * x_stride + j]; });
}

BLOCK_KERNEL column_dots(f32* partial, const f32* a, u32 a_stride, const f32* b, u32 b_stride, u32 rows, u32 width,
                         u32 chunk) {
    SHARED f32 cells[8][33];
    chunk_sums(partial, rows, width, chunk, cells,
               [&](u64 r, u32 j) { return a[r * a_stride + j] * b[r * b_stride + j]; });
}

BLOCK_KERNEL sum_partials(f32* out, const f32* partial, u32 chunks, u32 width, const f32* divisors, u32 accumulate) {
    SHARED f32 cells[8][33];
    sum_chunks(partial, chunks, width, cells, [&](u32 j, f32 sum) {
        if (divisors) sum /= divisors[j];
        out[j] = accumulate ? out[j] + sum : sum;
    });
}

// Eight rows of w in a block, so that `a` is read once for eight.
template <class W> DEVICE void row_norms(f32* n, W weight, const f32* b, const f32* a, u32 outputs, u32 inputs,
                                         u32 rank, f32 scale, f32* factors, f32* cells) {
    u32 first = blockIdx.x * 8;
    for (u32 i = threadIdx.x; i < 8 * rank; i += 256)
        factors[i] = first + i / rank < outputs ? scale * b[(u64)first * rank + i] : 0.0f;
    __syncthreads();
    f32 sums[8] = {};
    for (u32 j = threadIdx.x; j < inputs; j += 256) {
        f32 moved[8];
#pragma unroll
        for (u32 o = 0; o < 8; o++) moved[o] = first + o < outputs ? weight(first + o, j) : 0.0f;
        for (u32 r = 0; r < rank; r++) {
            f32 x = a[(u64)r * inputs + j];
#pragma unroll
            for (u32 o = 0; o < 8; o++) moved[o] += factors[o * rank + r] * x;
        }
#pragma unroll
        for (u32 o = 0; o < 8; o++) sums[o] += moved[o] * moved[o];
    }
#pragma unroll
    for (u32 o = 0; o < 8; o++) {
        f32 sum = team_sum(sums[o], cells);
        if (threadIdx.x == 0 && first + o < outputs) n[first + o] = sqrtf(sum);
    }
}

BLOCK_KERNEL row_norms_f32(f32* n, const f32* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                           u32 inputs, u32 rank, f32 scale) {
    SHARED f32 cells[32];
    DYNAMIC_SHARED(f32, factors);
    auto weight = [&](u64 i, u64 j) { return w[i * row + j * column]; };
    row_norms(n, weight, b, a, outputs, inputs, rank, scale, factors, cells);
}

BLOCK_KERNEL row_norms_bf16(f32* n, const u16* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                            u32 inputs, u32 rank, f32 scale) {
    SHARED f32 cells[32];
    DYNAMIC_SHARED(f32, factors);
    auto weight = [&](u64 i, u64 j) { return from_bf16(w[i * row + j * column]); };
    row_norms(n, weight, b, a, outputs, inputs, rank, scale, factors, cells);
}

BLOCK_KERNEL row_norms_f16(f32* n, const u16* w, u32 row, u32 column, const f32* b, const f32* a, u32 outputs,
                           u32 inputs, u32 rank, f32 scale) {
    SHARED f32 cells[32];
    DYNAMIC_SHARED(f32, factors);
    auto weight = [&](u64 i, u64 j) { return from_f16(w[i * row + j * column]); };
    row_norms(n, weight, b, a, outputs, inputs, rank, scale, factors, cells);
}
