// Which experts a row takes (experts.rs).
#include "common.cuh"

BLOCK_KERNEL route_choose(f32* probabilities, u32* chosen, f32* chosen_weights, u32 rows, u32 experts, u32 per_row,
                          u32 normalise) {
    u32 lane = threadIdx.x;
    each_row(rows, [&](u64 r) {
        f32* p = probabilities + r * experts;
        f32 max = -3.0e38f, sum = 0;
        for (u32 e = lane; e < experts; e += 32) max = larger(max, p[e]);
        max = warp_max(max);
        for (u32 e = lane; e < experts; e += 32) sum += expf(p[e] - max);
        sum = warp_sum(sum);
        // A lane only reads what it has written.
        for (u32 e = lane; e < experts; e += 32) p[e] = expf(p[e] - max) / sum;
        // The likeliest first, of equals the one before: each round takes the next in this order.
        f32 last = 3.0e38f, taken = 0;
        u32 last_expert = 0;
        for (u32 k = 0; k < per_row; k++) {
            f32 best = -1.0f;
            u32 expert = ~0u;
            for (u32 e = lane; e < experts; e += 32) {
                f32 x = p[e];
                bool after = x < last || (x == last && e > last_expert);
                if (after && x > best) best = x, expert = e;
            }
#pragma unroll
            for (int mask = 16; mask; mask >>= 1) {
                f32 x = shuffle_xor(best, mask);
                u32 e = shuffle_xor(expert, mask);
                if (x > best || (x == best && e < expert)) best = x, expert = e;
            }
            // In a row of NaNs none is the likeliest: the first ones are taken, and the NaN goes on.
            if (expert == ~0u) expert = k, best = of_bits(0x7fc00000u);
            last = best, last_expert = expert;
            taken += best;
            if (lane == 0) chosen[r * per_row + k] = expert, chosen_weights[r * per_row + k] = best;
        }
        if (normalise && lane == 0)
            for (u32 k = 0; k < per_row; k++) chosen_weights[r * per_row + k] /= taken;
    });
}

BLOCK_KERNEL route_count(u32* counts, const u32* chosen, u32 n) {
    SHARED u32 cells[32];
    u32 count = 0;
    for (u32 i = threadIdx.x; i < n; i += 256) count += chosen[i] == blockIdx.x;
    count = team_sum(count, cells);
    if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

BLOCK_KERNEL route_place(u32* slot_rows, u32* offsets, f32* weights, const u32* chosen, const f32* chosen_weights,
                         const u32* counts, u32 n, u32 experts, u32 per_row) {
    SHARED u32 cells[32];
    SHARED u32 before[8];
    u32 expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 first = 0;
    for (u32 e = threadIdx.x; e < expert; e += 256) first += counts[e];
    first = team_sum(first, cells);
    if (threadIdx.x == 0) {
        offsets[expert] = first;
        if (expert + 1 == experts) offsets[experts] = first + counts[expert];
    }
    // In the order of the list, 256 entries at a time.
    for (u32 base = 0; base < n; base += 256) {
        u32 i = base + threadIdx.x;
        bool mine = i < n && chosen[i] == expert;
        u32 lanes = ballot(mine);
        if (lane == 0) before[warp] = __popc(lanes);
        __syncthreads();
        u32 slot = first + __popc(lanes & ((1u << lane) - 1)), all = 0;
#pragma unroll
        for (u32 w = 0; w < 8; w++) {
            if (w < warp) slot += before[w];
            all += before[w];
        }
        if (mine) slot_rows[slot] = i / per_row, weights[slot] = chosen_weights[i];
        first += all;
        __syncthreads();
    }
}

// Bits that no computed value has: a NaN with a payload of its own.
#define NOT_TAKEN 0xffb5a5a5u

BLOCK_KERNEL route_backward(f32* d_logits, const f32* probabilities, const f32* d_weights, const u32* slot_rows,
                            const u32* offsets, u32 rows, u32 experts, u32 normalise) {
    each_row(rows, [&](u64 r) {
        const f32* p = probabilities + r * experts;
        f32* d = d_logits + r * experts;
        // The gradient of the weights of the experts taken, by a search among each expert's rows; a lane writes
        // and reads its own experts only.
        f32 sum = 0, dots = 0;
        for (u32 e = threadIdx.x; e < experts; e += 32) {
            u32 low = offsets[e], high = offsets[e + 1];
            while (low < high) {
                u32 middle = low + (high - low) / 2;
                if (slot_rows[middle] < (u32)r) low = middle + 1;
                else high = middle;
            }
            bool taken = low < offsets[e + 1] && slot_rows[low] == (u32)r;
            f32 x = taken ? d_weights[low] : 0.0f;
            d[e] = taken ? x : of_bits(NOT_TAKEN);
            if (taken) sum += p[e], dots += x * p[e];
        }
        sum = warp_sum(sum), dots = warp_sum(dots);
        f32 mean = normalise ? dots / sum : 0.0f, by = normalise ? sum : 1.0f, through = 0;
        for (u32 e = threadIdx.x; e < experts; e += 32) {
            bool taken = bits_of(d[e]) != NOT_TAKEN;
            d[e] = taken ? (d[e] - mean) / by : 0.0f;
            through += d[e] * p[e];
        }
        through = warp_sum(through);
        for (u32 e = threadIdx.x; e < experts; e += 32) d[e] = p[e] * (d[e] - through);
    });
}
