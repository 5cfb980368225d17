// The gradient's norm and the optimizers. Operations and their order are those of cpu/optimizer.rs.
#include "common.cuh"

BLOCK_KERNEL sum_squares(f64* partial, const f32* x, u64 n) {
    SHARED f64 cells[32];
    f64 sum = 0;
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(x + i, left);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += (f64)a.v[k] * (f64)a.v[k];
    });
    sum = team_sum(sum, cells);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

BLOCK_KERNEL sum_f64(f64* out, const f64* partial, u32 count) {
    SHARED f64 cells[32];
    f64 sum = 0;
    for (u32 i = threadIdx.x; i < count; i += 256) sum += partial[i];
    sum = team_sum(sum, cells);
    if (threadIdx.x == 0) *out = sum;
}

// Writes parameters, and where they are asked for their bf16 copies.
DEVICE void store_parameters(f32* p, u16* p16, u64 i, u64 left, const Four& x) {
    store(p + i, left, x);
    if (!p16) return;
    FourHalves y;
#pragma unroll
    for (int k = 0; k < 4; k++) y.v[k] = to_bf16(x.v[k]);
    store(p16 + i, left, y);
}

KERNEL adamw(f32* p, u16* p16, const f32* g, f32* m, f32* v, u64 n, f32 keep, f32 lerp1, f32 beta2, f32 lerp2,
             f32 root2, f32 eps, f32 rate, f32 scale) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(p + i, left), d = load(g + i, left), first = load(m + i, left), second = load(v + i, left);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            f32 x = d.v[k] * scale;
            first.v[k] += lerp1 * (x - first.v[k]);
            second.v[k] = beta2 * second.v[k] + lerp2 * x * x;
            a.v[k] = a.v[k] * keep - rate * (first.v[k] / (sqrtf(second.v[k]) / root2 + eps));
        }
        store(m + i, left, first);
        store(v + i, left, second);
        store_parameters(p, p16, i, left, a);
    });
}

// The code of the value nearest to x; of two that are as near, the lower.
DEVICE u8 nearest(const f32* values, f32 x) {
    u32 above = 0;
    // The first value that is not below x.
#pragma unroll
    for (u32 half = 128; half; half /= 2)
        if (values[above + half - 1] < x) above += half;
    u32 below = above ? above - 1 : 0;
    return (u8)(fabsf(x - values[below]) <= fabsf(values[above] - x) ? below : above);
}

BLOCK_KERNEL BOUNDS(256, 4)
    adamw_8bit(f32* p, u16* p16, const f32* g, u8* m_codes, f32* m_scales, u8* v_codes, f32* v_scales, u64 n,
               const f32* signed_values, const f32* unsigned_values, f32 keep, f32 beta1, f32 lerp1, f32 beta2,
               f32 lerp2, f32 root2, f32 eps, f32 rate, f32 scale) {
    SHARED f32 cells[32];
    SHARED f32 signed_of[256];
    SHARED f32 unsigned_of[256];
    u32 t = threadIdx.x;
    signed_of[t] = signed_values[t];
    unsigned_of[t] = unsigned_values[t];
    __syncthreads();
    for (u64 block = blockIdx.x; block * 256 < n; block += gridDim.x) {
        u64 i = block * 256 + t;
        f32 first = 0, second = 0;
        if (i < n) {
            f32 x = g[i] * scale;
            first = beta1 * (signed_of[m_codes[i]] * m_scales[block]) + lerp1 * x;
            second = beta2 * (unsigned_of[v_codes[i]] * v_scales[block]) + lerp2 * x * x;
            f32 y = p[i] * keep - rate * (first / (sqrtf(second) / root2 + eps));
            p[i] = y;
            if (p16) p16[i] = to_bf16(y);
        }
        // Every thread has read the scales before the barriers of these sums.
        f32 m_largest = team_max(fabsf(first), cells), v_largest = team_max(fabsf(second), cells);
        m_largest = m_largest == 0 ? 1.0f : m_largest, v_largest = v_largest == 0 ? 1.0f : v_largest;
        if (i < n) {
            m_codes[i] = nearest(signed_of, first / m_largest);
            v_codes[i] = nearest(unsigned_of, second / v_largest);
        }
        if (t == 0) m_scales[block] = m_largest, v_scales[block] = v_largest;
    }
}

// Added to squared gradients (Adafactor::EPS).
#define ADAFACTOR_EPS 1e-30f

BLOCK_KERNEL adafactor_rows(f32* rows, const f32* g, u32 height, u32 width, f32 beta2, f32 scale) {
    each_row(height, [&](u64 r) {
        f32 sum = 0;
        for (u32 j = threadIdx.x; j < width; j += 32) {
            f32 x = g[r * width + j] * scale;
            sum += x * x + ADAFACTOR_EPS;
        }
        sum = warp_sum(sum);
        if (threadIdx.x == 0) rows[r] = beta2 * rows[r] + (1.0f - beta2) * (sum / (f32)width);
    });
}

BLOCK_KERNEL adafactor_columns(f32* sums, const f32* g, u32 height, u32 width, u32 chunk, f32 scale) {
    SHARED f32 cells[8][33];
    chunk_sums(sums, height, width, chunk, cells, [&](u64 r, u32 j) {
        f32 x = g[r * width + j] * scale;
        return x * x + ADAFACTOR_EPS;
    });
}

BLOCK_KERNEL adafactor_blend(f32* columns, const f32* sums, u32 chunks, u32 height, u32 width, f32 beta2) {
    SHARED f32 cells[8][33];
    sum_chunks(sums, chunks, width, cells, [&](u32 j, f32 sum) {
        columns[j] = beta2 * columns[j] + (1.0f - beta2) * (sum / (f32)height);
    });
}

BLOCK_KERNEL adafactor_mean(f64* scalars, const f32* rows, u32 height) {
    SHARED f64 cells[32];
    f64 sum = 0;
    for (u32 i = threadIdx.x; i < height; i += 256) sum += rows[i];
    sum = team_sum(sum, cells);
    if (threadIdx.x == 0) scalars[0] = sum / height;
}

// What the update of a row multiplies its gradients by, beside the root of the column.
DEVICE f32 row_factor(f32 row, const f64* scalars, f32 scale) { return scale / sqrtf(row / (f32)scalars[0]); }

// The learning rate, less where the root mean square of the update is above 1.
DEVICE f32 clipped_rate(f64 lr, const f64* scalars, f64 count) {
    f64 rms = sqrt(scalars[1] / count);
    return (f32)(lr / (rms > 1.0 ? rms : 1.0));
}

BLOCK_KERNEL adafactor_squares(f64* partial, const f32* g, const f32* rows, const f32* columns, const f64* scalars,
                               u32 height, u32 width, f32 scale) {
    SHARED f64 cells[8];
    f64 sum = 0;
    each_row(height, [&](u64 r) {
        f32 factor = row_factor(rows[r], scalars, scale), row = 0;
        for (u32 j = threadIdx.x; j < width; j += 32) {
            f32 u = factor * g[r * width + j] / sqrtf(columns[j]);
            row += u * u;
        }
        sum += (f64)row;
    });
    sum = warp_sum(sum);
    if (threadIdx.x == 0) cells[threadIdx.y] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        for (int y = 1; y < 8; y++) sum += cells[y];
        partial[blockIdx.x] = sum;
    }
}

KERNEL adafactor_apply(f32* p, u16* p16, const f32* g, const f32* rows, const f32* columns, const f64* scalars,
                       u32 height, u32 width, f32 keep, f64 lr, f32 scale) {
    f32 rate = clipped_rate(lr, scalars, (f64)height * width);
    each_in_rows(height, width, [&](u64 r, u64 j, u64 left) {
        f32 factor = rate * row_factor(rows[r], scalars, scale);
        u64 i = r * width + j;
        Four a = load(p + i, left), d = load(g + i, left), column = load(columns + j, left);
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (k < left) a.v[k] = a.v[k] * keep - factor * d.v[k] / sqrtf(column.v[k]);
        store_parameters(p, p16, i, left, a);
    });
}

BLOCK_KERNEL adafactor_vector(f64* partial, f32* v, const f32* g, u64 n, f32 beta2, f32 scale) {
    SHARED f64 cells[32];
    f64 sum = 0;
    each_four(n, [&](u64 i, u64 left) {
        Four mean = load(v + i, left), d = load(g + i, left);
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (k < left) {
                f32 x = d.v[k] * scale;
                mean.v[k] = beta2 * mean.v[k] + (1.0f - beta2) * (x * x + ADAFACTOR_EPS);
                f32 u = x / sqrtf(mean.v[k]);
                sum += (f64)u * (f64)u;
            }
        store(v + i, left, mean);
    });
    sum = team_sum(sum, cells);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL adafactor_vector_apply(f32* p, u16* p16, const f32* g, const f32* v, const f64* scalars, u64 n, f32 keep,
                              f64 lr, f32 scale) {
    f32 rate = clipped_rate(lr, scalars, (f64)n);
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(p + i, left), d = load(g + i, left), mean = load(v + i, left);
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (k < left) a.v[k] = a.v[k] * keep - rate * scale * d.v[k] / sqrtf(mean.v[k]);
        store_parameters(p, p16, i, left, a);
    });
}

KERNEL sgd(f32* p, u16* p16, const f32* g, f32* m, u64 n, f32 rate, f32 momentum, f32 decay, f32 scale) {
    each_four(n, [&](u64 i, u64 left) {
        Four a = load(p + i, left), d = load(g + i, left);
#pragma unroll
        for (int k = 0; k < 4; k++) d.v[k] = d.v[k] * scale + decay * a.v[k];
        if (m) {
            Four last = load(m + i, left);
#pragma unroll
            for (int k = 0; k < 4; k++) d.v[k] += momentum * last.v[k];
            store(m + i, left, d);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) a.v[k] -= rate * d.v[k];
        store_parameters(p, p16, i, left, a);
    });
}
