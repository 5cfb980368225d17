// Conversions between types, and the blocks of quantised weights.
#include "common.cuh"

KERNEL f32_to_bf16(u16* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, y_stride, [&](u64 r, u64 j, u64 left) {
        Four a = {};
        if (j < width) a = load(x + r * x_stride + j, width - j);
        FourHalves b;
#pragma unroll
        for (int k = 0; k < 4; k++) b.v[k] = to_bf16(a.v[k]);
        store(y + r * y_stride + j, left, b);
    });
}

KERNEL f32_to_f16(u16* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, y_stride, [&](u64 r, u64 j, u64 left) {
        Four a = {};
        if (j < width) a = load(x + r * x_stride + j, width - j);
        FourHalves b;
#pragma unroll
        for (int k = 0; k < 4; k++) b.v[k] = to_f16(a.v[k]);
        store(y + r * y_stride + j, left, b);
    });
}

KERNEL bf16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        FourHalves a = load(x + r * x_stride + j, left);
        Four b;
#pragma unroll
        for (int k = 0; k < 4; k++) b.v[k] = from_bf16(a.v[k]);
        store(y + r * y_stride + j, left, b);
    });
}

KERNEL f16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        FourHalves a = load(x + r * x_stride + j, left);
        Four b;
#pragma unroll
        for (int k = 0; k < 4; k++) b.v[k] = from_f16(a.v[k]);
        store(y + r * y_stride + j, left, b);
    });
}

KERNEL f16_to_bf16(u16* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, y_stride, [&](u64 r, u64 j, u64 left) {
        FourHalves a = {};
        if (j < width) a = load(x + r * x_stride + j, width - j);
#pragma unroll
        for (int k = 0; k < 4; k++) a.v[k] = to_bf16(from_f16(a.v[k]));
        store(y + r * y_stride + j, left, a);
    });
}

// The values of NF4 (Dettmers et al. 2023), as bitsandbytes has them.
TABLE f32 NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// The table in shared memory, where every thread can look up another entry at once.
DEVICE void load_nf4(f32* table) {
    if (threadIdx.x < 16) table[threadIdx.x] = NF4[threadIdx.x];
    __syncthreads();
}

DEVICE f32 nf4_element(const f32* table, const u8* codes, const f32* scales, u64 i, u32 block) {
    u8 pair = codes[i / 2];
    return table[i % 2 ? pair & 15 : pair >> 4] * scales[i / block];
}

BLOCK_KERNEL nf4_to_bf16(u16* y, const u8* codes, const f32* scales, u64 n, u32 block) {
    SHARED f32 table[16];
    load_nf4(table);
    each_four(n, [&](u64 i, u64 left) {
        FourHalves a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? to_bf16(nf4_element(table, codes, scales, i + k, block)) : 0;
        store(y + i, left, a);
    });
}

BLOCK_KERNEL nf4_to_f32(f32* y, const u8* codes, const f32* scales, u64 n, u32 block) {
    SHARED f32 table[16];
    load_nf4(table);
    each_four(n, [&](u64 i, u64 left) {
        Four a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? nf4_element(table, codes, scales, i + k, block) : 0.0f;
        store(y + i, left, a);
    });
}

KERNEL int8_to_bf16(u16* y, const u8* codes, const f32* values, const f32* scales, u64 n, u32 block) {
    each_four(n, [&](u64 i, u64 left) {
        FourHalves a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? to_bf16(values[codes[i + k]] * scales[(i + k) / block]) : 0;
        store(y + i, left, a);
    });
}

KERNEL int8_to_f32(f32* y, const u8* codes, const f32* values, const f32* scales, u64 n, u32 block) {
    each_four(n, [&](u64 i, u64 left) {
        Four a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? values[codes[i + k]] * scales[(i + k) / block] : 0.0f;
        store(y + i, left, a);
    });
}

KERNEL int8_rows_to_bf16(u16* y, const i8* q, const f32* scales, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        f32 scale = scales[r] / 127.0f;
        FourHalves a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? to_bf16((f32)q[r * width + j + k] * scale) : 0;
        store(y + r * width + j, left, a);
    });
}

KERNEL int8_rows_to_f32(f32* y, const i8* q, const f32* scales, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        f32 scale = scales[r] / 127.0f;
        Four a;
#pragma unroll
        for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? (f32)q[r * width + j + k] * scale : 0.0f;
        store(y + r * width + j, left, a);
    });
}

// The nearest of the values; of two that are as near, the lower.
DEVICE u32 nf4_code(f32 x) {
    u32 code = 0;
#pragma unroll
    for (u32 k = 1; k < 16; k++)
        if (x > 0.5f * (NF4[k - 1] + NF4[k])) code = k;
    return code;
}

template <class X> DEVICE void to_nf4(u8* codes, f32* scales, u64 n, X value) {
    u64 blocks = (n + 63) / 64;
    for (u64 block = (u64)blockIdx.x * 8 + threadIdx.y; block < blocks; block += (u64)gridDim.x * 8) {
        u64 i = block * 64 + threadIdx.x * 2;
        f32 a = i < n ? value(i) : 0.0f, b = i + 1 < n ? value(i + 1) : 0.0f;
        f32 largest = warp_max(larger(fabsf(a), fabsf(b)));
        f32 inverse = largest > 0 ? 1.0f / largest : 0.0f;
        if (i < n) codes[i / 2] = (u8)(nf4_code(a * inverse) << 4 | nf4_code(b * inverse));
        if (threadIdx.x == 0) scales[block] = largest;
    }
}

BLOCK_KERNEL f32_to_nf4(u8* codes, f32* scales, const f32* x, u64 n) {
    to_nf4(codes, scales, n, [&](u64 i) { return x[i]; });
}

BLOCK_KERNEL bf16_to_nf4(u8* codes, f32* scales, const u16* x, u64 n) {
    to_nf4(codes, scales, n, [&](u64 i) { return from_bf16(x[i]); });
}
