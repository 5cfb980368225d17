// Rows chosen by number, positions and random numbers.
#include "common.cuh"

// Elements of a row next to each other are read four at a time.
template <class T, class V> DEVICE void gather(f32* y, const T* x, u32 row, u32 column, const u32* rows, u32 count,
                                               u32 width, V value) {
    each_in_rows(count, width, [&](u64 i, u64 j, u64 left) {
        const T* from = x + (u64)rows[i] * row;
        Four a;
        if (column == 1) {
            auto four = load(from + j, left);
#pragma unroll
            for (u32 k = 0; k < 4; k++) a.v[k] = value(four.v[k]);
        } else {
#pragma unroll
            for (u32 k = 0; k < 4; k++) a.v[k] = k < left ? value(from[(j + k) * column]) : 0.0f;
        }
        store(y + i * width + j, left, a);
    });
}

KERNEL gather_f32(f32* y, const f32* x, u32 row, u32 column, const u32* rows, u32 count, u32 width) {
    gather(y, x, row, column, rows, count, width, [](f32 x) { return x; });
}

KERNEL gather_bf16(f32* y, const u16* x, u32 row, u32 column, const u32* rows, u32 count, u32 width) {
    gather(y, x, row, column, rows, count, width, [](u16 x) { return from_bf16(x); });
}

KERNEL gather_f16(f32* y, const u16* x, u32 row, u32 column, const u32* rows, u32 count, u32 width) {
    gather(y, x, row, column, rows, count, width, [](u16 x) { return from_f16(x); });
}

BLOCK_KERNEL scatter_links(u32* links, const u32* rows, u32 count) {
    SHARED u32 tile[256];
    u32 i = blockIdx.x * 256 + threadIdx.x, mine = i < count ? rows[i] : 0;
    u32 next = count, before = 0;
    for (u32 first = 0; first < count; first += 256) {
        __syncthreads();
        if (first + threadIdx.x < count) tile[threadIdx.x] = rows[first + threadIdx.x];
        __syncthreads();
        u32 entries = smaller(256u, count - first);
#pragma unroll 8
        for (u32 k = 0; k < entries; k++) {
            u32 j = first + k;
            bool equal = tile[k] == mine;
            if (equal && j < i) before = 1u << 31;
            if (equal && j > i) next = smaller(next, j);
        }
    }
    if (i < count) links[i] = next | before;
}

KERNEL scatter_add(f32* y, const f32* x, const u32* rows, const u32* links, u32 count, u32 width) {
    for (u64 i = blockIdx.y; i < count; i += gridDim.y) {
        // The first entry of a row adds all of them.
        if (links[i] >> 31) continue;
        f32* to = y + (u64)rows[i] * width;
        for (u64 j = blockIdx.x * blockDim.x + threadIdx.x; j < width; j += (u64)gridDim.x * blockDim.x) {
            f32 sum = to[j];
            for (u64 from = i; from < count; from = links[from] & ~(1u << 31)) sum += x[from * width + j];
            to[j] = sum;
        }
    }
}

KERNEL rotate(f32* x, u32 x_stride, u32 rows, u32 heads, u32 head_dim, const f32* table, u32 half,
              const u32* positions, u32 inverse) {
    for (u64 r = blockIdx.x; r < rows; r += gridDim.x) {
        const f32* angles = table + (u64)positions[r] * 2 * half;
        for (u32 i = threadIdx.x; i < heads * half; i += blockDim.x) {
            u32 f = i % half;
            f32* front = x + r * x_stride + (u64)(i / half) * head_dim + f;
            f32 cosine = angles[f], sine = inverse ? -angles[half + f] : angles[half + f];
            f32 a = front[0], b = front[half];
            front[0] = a * cosine - b * sine;
            front[half] = b * cosine + a * sine;
        }
    }
}

// f(row, column, word) for each element. A thread has the four words of a counter.
template <class F> DEVICE void each_random(u32 rows, u32 width, u64 key, u32 site, F f) {
    u64 counters = (width + 31ull) / 32 * 8;
    for (u64 r = blockIdx.y * 8 + threadIdx.y; r < rows; r += (u64)gridDim.y * 8)
        for (u64 c = blockIdx.x * 32 + threadIdx.x; c < counters; c += (u64)gridDim.x * 32) {
            Philox random = random_words(key, site, r, c / 8, c % 8);
#pragma unroll
            for (u32 w = 0; w < 4; w++) {
                u64 j = c / 8 * 32 + w * 8 + c % 8;
                if (j < width) f(r, j, random.words[w]);
            }
        }
}

KERNEL dropout(f32* x, u32 rows, u32 width, u64 key, u32 site, u64 limit, f32 kept) {
    each_random(rows, width, key, site, [&](u64 r, u64 j, u32 word) { x[r * width + j] *= word < limit ? 0.0f : kept; });
}

KERNEL add_noise(f32* x, const f32* sizes, u32 rows, u32 width, u64 key, u32 site) {
    each_random(rows, width, key, site, [&](u64 r, u64 j, u32 word) {
        f32 uniform = (f32)(word >> 8) * (2.0f / 16777216.0f) - 1.0f;
        x[r * width + j] += sizes[r] * uniform;
    });
}
