// Operations on each element by itself, and products of rows.
#include "common.cuh"

KERNEL fill(f32* x, u64 n, f32 value) {
    each_four(n, [&](u64 i, u64 left) { store(x + i, left, {{value, value, value, value}}); });
}

KERNEL scale(f32* x, u64 n, f32 factor) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(x + i, left);
        for (int k = 0; k < 4; k++) a.v[k] *= factor;
        store(x + i, left, a);
    });
}

KERNEL copy_rows(f32* y, u32 y_stride, const f32* x, u32 x_stride, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        store(y + r * y_stride + j, left, load(x + r * x_stride + j, left));
    });
}

KERNEL blend(f32* y, const f32* x, u64 n, f32 share) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(y + i, left), b = load(x + i, left);
        for (int k = 0; k < 4; k++) a.v[k] += share * (b.v[k] - a.v[k]);
        store(y + i, left, a);
    });
}

KERNEL swap(f32* x, f32* y, u64 n) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(x + i, left), b = load(y + i, left);
        store(x + i, left, b);
        store(y + i, left, a);
    });
}

KERNEL add(f32* y, const f32* x, u64 n) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(y + i, left), b = load(x + i, left);
        for (int k = 0; k < 4; k++) a.v[k] += b.v[k];
        store(y + i, left, a);
    });
}

KERNEL add_row(f32* y, u32 y_stride, const f32* b, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        Four a = load(y + r * y_stride + j, left), c = load(b + j, left);
        for (int k = 0; k < 4; k++) a.v[k] += c.v[k];
        store(y + r * y_stride + j, left, a);
    });
}

KERNEL divide(f32* y, const f32* a, const f32* b, u64 n) {
    each_four(n, [&](u64 i, u64 left) {
        Four c = load(a + i, left), d = load(b + i, left);
        for (u32 k = 0; k < 4; k++) c.v[k] = k < left ? c.v[k] / d.v[k] : 0.0f;
        store(y + i, left, c);
    });
}

KERNEL scale_columns(f32* y, u32 y_stride, const f32* x, u32 x_stride, const f32* factors, const f32* bias, u32 rows,
                     u32 width, u32 accumulate) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        Four a = load(x + r * x_stride + j, left), f = load(factors + j, left);
        for (int k = 0; k < 4; k++) a.v[k] *= f.v[k];
        if (bias) {
            Four b = load(bias + j, left);
            for (int k = 0; k < 4; k++) a.v[k] += b.v[k];
        }
        if (accumulate) {
            Four old = load(y + r * y_stride + j, left);
            for (int k = 0; k < 4; k++) a.v[k] += old.v[k];
        }
        store(y + r * y_stride + j, left, a);
    });
}

KERNEL scale_rows(f32* x, const f32* factors, u32 rows, u32 width) {
    each_in_rows(rows, width, [&](u64 r, u64 j, u64 left) {
        f32* at = x + r * width + j;
        f32 factor = factors[r];
        Four a = load(at, left);
        for (int k = 0; k < 4; k++) a.v[k] *= factor;
        store(at, left, a);
    });
}

BLOCK_KERNEL row_dots(f32* out, const f32* a, const f32* b, u32 rows, u32 width) {
    each_row(rows, [&](u64 r) {
        f32 sum = 0;
        for (u64 j = threadIdx.x * 4; j < width; j += 128) {
            Four x = load(a + r * width + j, width - j), y = load(b + r * width + j, width - j);
            for (int k = 0; k < 4; k++) sum += x.v[k] * y.v[k];
        }
        sum = warp_sum(sum);
        if (threadIdx.x == 0) out[r] = sum;
    });
}
