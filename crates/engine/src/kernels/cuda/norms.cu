// RMS and layer norm of groups of columns: whole rows, or heads.
#include "common.cuh"

// A group for each row of threads.
struct Teams {
    u64 first, step;
};

DEVICE Teams teams() { return {(u64)blockIdx.x * blockDim.y + threadIdx.y, (u64)gridDim.x * blockDim.y}; }

// Where a group starts.
DEVICE u64 group_at(u64 group, u32 per_row, u32 stride, u32 width) {
    return group / per_row * stride + group % per_row * width;
}

// One element of y. Both kernels that write y go through it, so they write the same bytes.
DEVICE f32 normalised(f32 x, f32 mean, f32 inverse, f32 weight, f32 bias) {
    return (x - mean) * inverse * weight + bias;
}

DEVICE void write_group(f32* y, const f32* x, f32 mean, f32 inverse, const f32* w, f32 offset, const f32* b, u32 j,
                        u32 left) {
    Four a = load(x + j, left), weight = load(w + j, left), bias = {};
    if (b) bias = load(b + j, left);
#pragma unroll
    for (int k = 0; k < 4; k++) a.v[k] = normalised(a.v[k], mean, inverse, offset + weight.v[k], bias.v[k]);
    store(y + j, left, a);
}

// Every thread of a block takes part in the sums of every round.
template <bool LAYER>
DEVICE void norm(f32* y, u32 y_stride, f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b, u32 groups,
                 u32 per_row, u32 width, f32 eps, f32 offset, f32* cells) {
    Teams team = teams();
    for (u64 round = (u64)blockIdx.x * blockDim.y; round < groups; round += team.step) {
        u64 group = round + threadIdx.y;
        bool mine = group < groups;
        const f32* from = x + (mine ? group_at(group, per_row, x_stride, width) : 0);
        f32 mean = 0, squares = 0;
        if (LAYER) {
            f32 sum = 0;
            if (mine)
                for (u32 j = threadIdx.x * 4; j < width; j += blockDim.x * 4) {
                    Four a = load(from + j, width - j);
#pragma unroll
                    for (int k = 0; k < 4; k++) sum += a.v[k];
                }
            mean = team_sum(sum, cells) / (f32)width;
        }
        if (mine)
            for (u32 j = threadIdx.x * 4; j < width; j += blockDim.x * 4) {
                Four a = load(from + j, width - j);
#pragma unroll
                for (u32 k = 0; k < 4; k++) {
                    // What is not there is 0.
                    f32 off = !LAYER ? a.v[k] : j + k < width ? a.v[k] - mean : 0.0f;
                    squares += off * off;
                }
            }
        f32 inverse = 1.0f / sqrtf(team_sum(squares, cells) / (f32)width + eps);
        if (!mine) continue;
        f32* to = y + group_at(group, per_row, y_stride, width);
        for (u32 j = threadIdx.x * 4; j < width; j += blockDim.x * 4)
            write_group(to, from, mean, inverse, w, offset, b, j, width - j);
        if (threadIdx.x != 0) continue;
        if (LAYER) stats[2 * group] = mean, stats[2 * group + 1] = inverse;
        else stats[group] = inverse;
    }
}

BLOCK_KERNEL rms_norm(f32* y, u32 y_stride, f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                      u32 groups, u32 per_row, u32 width, f32 eps, f32 offset) {
    SHARED f32 cells[32];
    norm<false>(y, y_stride, stats, x, x_stride, w, b, groups, per_row, width, eps, offset, cells);
}

BLOCK_KERNEL layer_norm(f32* y, u32 y_stride, f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                        u32 groups, u32 per_row, u32 width, f32 eps) {
    SHARED f32 cells[32];
    norm<true>(y, y_stride, stats, x, x_stride, w, b, groups, per_row, width, eps, 0.0f, cells);
}

KERNEL norm_again(f32* y, u32 y_stride, const f32* stats, const f32* x, u32 x_stride, const f32* w, const f32* b,
                  u32 groups, u32 per_row, u32 width, f32 offset, u32 layer) {
    each_in_rows(groups, width, [&](u64 group, u64 j, u64 left) {
        f32 mean = layer ? stats[2 * group] : 0.0f, inverse = layer ? stats[2 * group + 1] : stats[group];
        write_group(y + group_at(group, per_row, y_stride, width), x + group_at(group, per_row, x_stride, width), mean,
                    inverse, w, offset, b, (u32)j, (u32)left);
    });
}

BLOCK_KERNEL norm_backward(f32* dx, u32 dx_stride, f32* dw_partial, f32* db_partial, const f32* dy, u32 dy_stride,
                           const f32* stats, const f32* x, u32 x_stride, const f32* w, u32 groups, u32 per_row,
                           u32 width, f32 offset, u32 layer) {
    SHARED f32 cells[32];
    DYNAMIC_SHARED(f32, sums);
    // Each row of threads sums dw and db of its groups; a column always belongs to the same thread.
    f32* dw = sums + (u64)threadIdx.y * width;
    f32* db = sums + (u64)(dw_partial ? blockDim.y : 0) * width + (u64)threadIdx.y * width;
    for (u32 j = threadIdx.x; j < width; j += blockDim.x) {
        if (dw_partial) dw[j] = 0;
        if (db_partial) db[j] = 0;
    }
    Teams team = teams();
    for (u64 round = (u64)blockIdx.x * blockDim.y; round < groups; round += team.step) {
        u64 group = round + threadIdx.y;
        bool mine = group < groups;
        f32 mean = 0, inverse = 0, along = 0, level = 0;
        const f32 *from = x, *d = dy;
        if (mine) {
            from += group_at(group, per_row, x_stride, width), d += group_at(group, per_row, dy_stride, width);
            mean = layer ? stats[2 * group] : 0.0f, inverse = layer ? stats[2 * group + 1] : stats[group];
            for (u32 j = threadIdx.x; j < width; j += blockDim.x) {
                f32 g = d[j] * (offset + w[j]);
                along += g * (from[j] - mean) * inverse;
                level += g;
            }
        }
        along = team_sum(along, cells) / (f32)width;
        level = layer ? team_sum(level, cells) / (f32)width : 0.0f;
        if (!mine) continue;
        f32* to = dx + group_at(group, per_row, dx_stride, width);
        for (u32 j = threadIdx.x; j < width; j += blockDim.x) {
            f32 dyj = d[j], hat = (from[j] - mean) * inverse, g = dyj * (offset + w[j]);
            to[j] += inverse * (g - level - hat * along);
            if (dw_partial) dw[j] += dyj * hat;
            if (db_partial) db[j] += dyj;
        }
    }
    __syncthreads();
    // The rows of threads in their order.
    u32 thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (u32 j = thread; j < width; j += threads) {
        f32 w_sum = 0, b_sum = 0;
        for (u32 y = 0; y < blockDim.y; y++) {
            if (dw_partial) w_sum += sums[(u64)y * width + j];
            if (db_partial) b_sum += sums[(u64)((dw_partial ? blockDim.y : 0) + y) * width + j];
        }
        if (dw_partial) dw_partial[(u64)blockIdx.x * width + j] = w_sum;
        if (db_partial) db_partial[(u64)blockIdx.x * width + j] = b_sum;
    }
}
