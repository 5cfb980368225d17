// Softmax cross-entropy of rows of logits, with the gradient in place.
#include "common.cuh"

// Of the logits that a thread has seen: the largest, and the sums of e^(x − max) and of e^(x − max) · (x − max).
struct Sums {
    f32 max, exponentials, weighted;

    // The same sums for a larger maximum.
    DEVICE_METHOD void raise(f32 to) {
        f32 by = max - to, factor = expf(by);
        weighted = factor * (weighted + by * exponentials);
        exponentials *= factor;
        max = to;
    }
};

DEVICE f32 capped(f32 x, f32 softcap) { return softcap > 0 ? softcap * tanhf(x / softcap) : x; }

BLOCK_KERNEL BOUNDS(512, 2) cross_entropy(f32* losses, f32* logits, const u32* ids, const f32* weights, u32 rows,
                                          u32 vocab, f32 softcap, f32 smoothing) {
    SHARED f32 cells[32];
    u64 r = blockIdx.x;
    f32* row = logits + r * vocab;
    u32 id = ids[r];
    f32 target = capped(row[id], softcap);
    // Finite, so that no difference of infinities arises.
    Sums sums = {-3.0e38f, 0, 0};
    f32 total = 0, beaten = 0;
    for (u32 j = threadIdx.x * 4; j < vocab; j += 512 * 4) {
        Four x = load(row + j, vocab - j);
        u32 count = smaller(4u, vocab - j);
        f32 max = sums.max;
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (k < count) {
                x.v[k] = capped(x.v[k], softcap);
                max = larger(max, x.v[k]);
            }
        if (max > sums.max) sums.raise(max);
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (k < count) {
                f32 e = expf(x.v[k] - max);
                sums.exponentials += e;
                if (e > 0) sums.weighted += e * (x.v[k] - max);
                total += x.v[k];
                // The first of equals is the most likely one.
                if (x.v[k] > target || (x.v[k] == target && j + k < id)) beaten = 1;
            }
    }
    f32 max = team_max(sums.max, cells);
    sums.raise(max);
    f32 exponentials = team_sum(sums.exponentials, cells), weighted = team_sum(sums.weighted, cells);
    beaten = team_max(beaten, cells);
    total = smoothing > 0 ? team_sum(total, cells) : 0.0f;
    f32 log_sum = logf(exponentials);
    if (threadIdx.x == 0) {
        f32* out = losses + r * 4;
        out[0] = max + log_sum - target;
        out[1] = beaten > 0 ? 0.0f : 1.0f;
        out[2] = log_sum - weighted / exponentials;
        out[3] = smoothing > 0 ? max + log_sum - total / (f32)vocab : 0.0f;
    }
    if (!weights) return;
    // All threads have read the target's logit: the sums above are barriers.
    f32 weight = weights[r], inverse = 1.0f / exponentials, level = smoothing / (f32)vocab;
    for (u32 j = threadIdx.x * 4; j < vocab; j += 512 * 4) {
        Four x = load(row + j, vocab - j);
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            f32 slope = 1.0f, y = x.v[k];
            if (softcap > 0) {
                f32 t = tanhf(y / softcap);
                y = softcap * t, slope = 1.0f - t * t;
            }
            f32 label = j + k == id ? 1.0f - smoothing : 0.0f;
            x.v[k] = weight * (expf(y - max) * inverse - label - level) * slope;
        }
        store(row + j, vocab - j, x);
    }
}
