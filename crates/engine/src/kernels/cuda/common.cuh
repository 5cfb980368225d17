// Loops over operands, sums of warps and blocks.
#pragma once
#include "kernels.h"

template <class T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE T larger(T a, T b) { return a > b ? a : b; }

template <class T> struct alignas(4 * sizeof(T)) FourOf {
    T v[4];
};
typedef FourOf<f32> Four;
typedef FourOf<u16> FourHalves;

// Up to four elements: one access where the address allows it. What lies past `count` is 0.
template <class T> DEVICE FourOf<T> load(const T* x, u64 count) {
    if (count >= 4 && ((u64)x & (sizeof(FourOf<T>) - 1)) == 0) return *(const FourOf<T>*)x;
    FourOf<T> y;
#pragma unroll
    for (u32 k = 0; k < 4; k++) y.v[k] = k < count ? x[k] : (T)0;
    return y;
}

template <class T> DEVICE void store(T* y, u64 count, const FourOf<T>& x) {
    if (count >= 4 && ((u64)y & (sizeof(FourOf<T>) - 1)) == 0) {
        *(FourOf<T>*)y = x;
        return;
    }
#pragma unroll
    for (u32 k = 0; k < 4; k++)
        if (k < count) y[k] = x.v[k];
}

// f(first element, elements left) for each four elements of a vector. Launch E.
template <class F> DEVICE void each_four(u64 n, F f) {
    u64 step = (u64)gridDim.x * blockDim.x * 4;
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += step) f(i, n - i);
}

// f(row, first column, columns left) for each four elements of a matrix. Launch R.
template <class F> DEVICE void each_in_rows(u32 rows, u32 width, F f) {
    for (u64 r = blockIdx.y * 8 + threadIdx.y; r < rows; r += (u64)gridDim.y * 8)
        for (u64 j = (blockIdx.x * 32 + threadIdx.x) * 4; j < width; j += (u64)gridDim.x * 128) f(r, j, width - j);
}

// f(row) of each warp. Launch W.
template <class F> DEVICE void each_row(u32 rows, F f) {
    for (u64 r = (u64)blockIdx.x * 8 + threadIdx.y; r < rows; r += (u64)gridDim.x * 8) f(r);
}

// The sum of a warp, the same bytes in every lane.
template <class T> DEVICE T warp_sum(T x) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
    return x;
}

template <class T> DEVICE T warp_max(T x) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) x = larger(x, shuffle_xor(x, mask));
    return x;
}

// The sum of a row of threads: a warp where blockDim.x is 32, else the whole block of one row. `cells` are 32.
template <class T> DEVICE T team_sum(T x, T* cells) {
    x = warp_sum(x);
    if (blockDim.x == 32) return x;
    u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) cells[threadIdx.x / 32] = x;
#ifndef PLANT_MISSING_BARRIER
    __syncthreads();
#endif
    x = warp_sum(lane < warps ? cells[lane] : (T)0);
    // The cells may be written again.
    __syncthreads();
    return x;
}

template <class T> DEVICE T team_max(T x, T* cells) {
    x = warp_max(x);
    if (blockDim.x == 32) return x;
    u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) cells[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_max(cells[lane < warps ? lane : 0]);
    __syncthreads();
    return x;
}

// cells[8][33] of a block (32, 8): adds the sums of the eight warps, in their order.
DEVICE f32 over_warps(f32 sum, f32 (*cells)[33]) {
    cells[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (u32 y = 0; y < 8; y++) sum += cells[y][threadIdx.x];
    return sum;
}

// partial[blockIdx.y, column] = the sum of value(row, column) over a chunk of rows, in a fixed order. Launch C.
template <class F>
DEVICE void chunk_sums(f32* partial, u32 rows, u32 width, u32 chunk, f32 (*cells)[33], F value) {
    u32 j = blockIdx.x * 32 + threadIdx.x;
    u64 first = (u64)blockIdx.y * chunk, end = smaller(first + chunk, (u64)rows);
    f32 sum = 0;
    if (j < width)
        for (u64 r = first + threadIdx.y; r < end; r += 8) sum += value(r, j);
    sum = over_warps(sum, cells);
    if (threadIdx.y == 0 && j < width) partial[(u64)blockIdx.y * width + j] = sum;
}

// write(column, sum) of the sums of all chunks, in a fixed order. Launch F.
template <class F> DEVICE void sum_chunks(const f32* partial, u32 chunks, u32 width, f32 (*cells)[33], F write) {
    u32 j = blockIdx.x * 32 + threadIdx.x;
    f32 sum = 0;
    if (j < width)
        for (u64 c = threadIdx.y; c < chunks; c += 8) sum += partial[c * width + j];
    sum = over_warps(sum, cells);
    if (threadIdx.y == 0 && j < width) write(j, sum);
}

struct Philox {
    u32 words[4];
};

// Ten rounds of Philox4x32 (random.rs).
DEVICE Philox philox(u32 c0, u32 c1, u32 c2, u32 c3, u64 key) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 a = (u64)c0 * 0xD2511F53u, b = (u64)c2 * 0xCD9E8D57u;
        u32 n0 = (u32)(b >> 32) ^ c1 ^ k0, n2 = (u32)(a >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (u32)b, c2 = n2, c3 = (u32)a;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The words of counter `lane` of a group of 32 columns: word w is of column 32 · group + 8 · w + lane.
DEVICE Philox random_words(u64 key, u32 site, u64 row, u32 group, u32 lane) {
    return philox(group * 8 + lane, (u32)row, (u32)(row >> 32), site, key);
}

// The word of one element.
DEVICE u32 random_word(u64 key, u32 site, u64 row, u32 column) {
    Philox p = random_words(key, site, row, column / 32, column % 8);
    u32 w = column / 8 % 4;
    return w == 0 ? p.words[0] : w == 1 ? p.words[1] : w == 2 ? p.words[2] : p.words[3];
}
