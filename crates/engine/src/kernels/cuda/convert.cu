// Conversions between types, and the blocks of quantised weights.
#include "common.cuh"

// y = f(x); columns of y from `width` up to `padded` are those of 0.
template <class Y, class X, class F>
DEVICE void convert(Y* y, u32 y_stride, u32 padded, const X* x, u32 x_stride, u32 rows, u32 width, F f) {
    each_in_rows(rows, padded, [&](u64 r, u64 j, u64 left) {
        FourOf<X> a = {};
        if (j < width) a = load(x + r * x_stride + j, width - j);
        FourOf<Y> b;
#pragma unroll
        for (int k = 0; k < 4; k++) b.v[k] = f(a.v[k]);
        store(y + r * y_stride + j, left, b);
    });
}

KERNEL f32_to_bf16(u16* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width) {
    convert(y, y_stride, y_stride, x, x_stride, rows, width, [](f32 x) { return to_bf16(x); });
}

KERNEL f16_to_bf16(u16* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    convert(y, y_stride, y_stride, x, x_stride, rows, width, [](u16 x) { return to_bf16(from_f16(x)); });
}

KERNEL bf16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    convert(y, y_stride, width, x, x_stride, rows, width, [](u16 x) { return from_bf16(x); });
}

KERNEL f16_to_f32(f32* y, u32 y_stride, const u16* x, u32 x_stride, u32 rows, u32 width) {
    convert(y, y_stride, width, x, x_stride, rows, width, [](u16 x) { return from_f16(x); });
}

// A value in the type of a result, f32 or bf16.
DEVICE void put(f32* y, f32 x) { *y = x; }
DEVICE void put(u16* y, f32 x) { *y = to_bf16(x); }

// Four elements from y on, of which `left` are there.
template <class Y, class F> DEVICE void put_four(Y* y, u64 left, F value) {
    FourOf<Y> a = {};
#pragma unroll
    for (u32 k = 0; k < 4; k++)
        if (k < left) put(a.v + k, value(k));
    store(y, left, a);
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

template <class Y> DEVICE void unpack_nf4(Y* y, const u8* codes, const f32* scales, u64 n, u32 block, f32* table) {
    load_nf4(table);
    each_four(n, [&](u64 i, u64 left) {
        put_four(y + i, left, [&](u32 k) {
            u8 pair = codes[(i + k) / 2];
            return table[(i + k) % 2 ? pair & 15 : pair >> 4] * scales[(i + k) / block];
        });
    });
}

BLOCK_KERNEL nf4_to_bf16(u16* y, const u8* codes, const f32* scales, u64 n, u32 block) {
    SHARED f32 table[16];
    unpack_nf4(y, codes, scales, n, block, table);
}

BLOCK_KERNEL nf4_to_f32(f32* y, const u8* codes, const f32* scales, u64 n, u32 block) {
    SHARED f32 table[16];
    unpack_nf4(y, codes, scales, n, block, table);
}

KERNEL int8_to_f32(f32* y, const u8* codes, const f32* values, const f32* scales, u64 n, u32 block) {
    each_four(n, [&](u64 i, u64 left) {
        put_four(y + i, left, [&](u32 k) { return values[codes[i + k]] * scales[(i + k) / block]; });
    });
}

template <class Y> DEVICE void unpack_rows(Y* y, const i8* q, const f32* scales, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        u64 i = r * width + j;
        f32 scale = scales[r] / 127.0f;
        put_four(y + i, left, [&](u32 k) { return (f32)q[i + k] * scale; });
    });
}

KERNEL int8_rows_to_bf16(u16* y, const i8* q, const f32* scales, u32 rows, u32 width) {
    unpack_rows(y, q, scales, rows, width);
}

KERNEL int8_rows_to_f32(f32* y, const i8* q, const f32* scales, u32 rows, u32 width) {
    unpack_rows(y, q, scales, rows, width);
}
