// Flash attention (Dao et al. 2022) over the ranges of a plan: scores exist in registers only, and the backward pass
// computes them again from the log-sum-exp. README.md describes the lists and the launches.
//
// All products are of tensor cores: bf16 values, f32 sums. A value of more than 8 bits is the sum of three bf16
// values ("parts"); then a product of two is the sum of six products, and as exact as one of f32 values.
//
// A warp has 16 rows: queries in the forward pass and for dq, keys for dk and dv. Tiles of the other side pass by.
// The backward pass has two kernels, so that each gradient is summed by one warp, in a fixed order.
#include "tiles.cuh"

#define LOG2E 1.4426950408889634f

// What a variant is compiled for: columns of a head in shared memory, parts, rows of a block, rows of a passing tile.
template <int COLUMNS, int PARTS_, int ROWS_, int FORWARD_, int BACKWARD_> struct Variant {
    static constexpr int D = COLUMNS, PARTS = PARTS_, ROWS = ROWS_, FORWARD = FORWARD_, BACKWARD = BACKWARD_;
    // Both gradients of 16 keys do not fit in a thread's registers.
    static constexpr bool SPLIT = D == 256;
};

KERNEL attention_split(u16* planes, const f32* x, u32 rows, u32 heads, u32 head_dim, u32 padded, u32 parts) {
    u64 n = (u64)rows * heads * padded;
    each_four(n, [&](u64 i, u64 left) {
        u64 head = i / padded;
        u32 d = (u32)(i % padded);
        Four a = {};
        if (d < head_dim) a = load(x + head * head_dim + d, head_dim - d);
        for (u32 part = 0; part < parts; part++) {
            FourHalves b;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                b.v[k] = to_bf16(a.v[k]);
                a.v[k] -= from_bf16(b.v[k]);
            }
            store(planes + part * n + i, left, b);
        }
    });
}

BLOCK_KERNEL attention_delta(f32* delta, const f32* o, const f32* d_o, u32 queries, u32 heads, u32 head_dim) {
    each_row(queries * heads, [&](u64 r) {
        f32 sum = 0;
        for (u32 d = threadIdx.x; d < head_dim; d += 32) sum += o[r * head_dim + d] * d_o[r * head_dim + d];
        sum = warp_sum(sum);
        if (threadIdx.x == 0) delta[r] = sum;
    });
}

// Begins to load a tile. row_of(i) is the number of the source's row, or below 0 for a row of zeros; rows are
// `stride` apart and parts `plane`.
template <int D, int PARTS, int ROWS, int THREADS, class F>
DEVICE void load_tile(u16* tile, const u16* from, u64 plane, u32 stride, F row_of) {
    constexpr u32 CHUNKS = D / 8;
    for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        u32 row = i / CHUNKS, chunk = i % CHUNKS;
        long long source = row_of(row);
        const u16* at = from + (source < 0 ? 0 : (u64)source * stride + chunk * 8);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            copy_async(tile + part * ROWS * D + in_tile<D>(row, chunk), at + part * plane, source < 0);
    }
}

// c[16, N] = the rows of `a` from `first` on · the rows of `b`, transposed.
template <int D, int PARTS, int ROWS_A, int N>
DEVICE void scores_of(f32 (&c)[N / 8][4], const u16* a, u32 first, const u16* b) {
    u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    LaneAddress<D> of_a(a + first * D, matrix % 2 * 8 + r, matrix / 2), of_b(b, matrix / 2 * 8 + r, matrix % 2);
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) c[n][k] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 x[PARTS][4];
#pragma unroll
        for (int part = 0; part < PARTS; part++) load_matrices(x[part], of_a.at(part * ROWS_A, k * 2));
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            u32 y[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; part++) load_matrices(y[part], of_b.at(part * N + n * 16, k * 2));
            multiply_parts<PARTS>(c[2 * n], c[2 * n + 1], x, y);
        }
    }
}

// c[16, D] += s[16, N] · b[N, D].
template <int D, int PARTS, int N> DEVICE void add_product(f32 (&c)[D / 8][4], const f32 (&s)[N / 8][4], const u16* b) {
    u32 lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    LaneAddress<D> of_b(b, matrix % 2 * 8 + r, matrix / 2);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        u32 x[PARTS][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // The sums of a product are laid out as the first operand of the next.
            f32 low = s[2 * k + i / 2][i % 2 * 2], high = s[2 * k + i / 2][i % 2 * 2 + 1];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                x[part][i] = pack_bf16(low, high);
                low -= of_bits(x[part][i] << 16), high -= of_bits(x[part][i] & 0xffff0000u);
            }
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 y[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; part++) load_transposed(y[part], of_b.at(part * N + k * 16, n * 2));
            multiply_parts<PARTS>(c[2 * n], c[2 * n + 1], x, y);
        }
    }
}

// The range of some queries. The place of a key is its number among the range's keys, prefix then own.
struct Range {
    u32 first_query, queries, prefix_start, prefix_length, own_start;

    // The place of a query's own key.
    DEVICE_METHOD int query_place(const u32* rows, u32 query) const {
        return (int)(prefix_length + rows[query] - own_start);
    }

    DEVICE_METHOD long long key_row(u32 place) const {
        return place < prefix_length ? prefix_start + place : own_start + place - prefix_length;
    }
};

// The places that a query sees.
struct Seen {
    int low, high;

    DEVICE_METHOD bool sees(int place) const { return place >= low && place <= high; }
};

// What a row without a query sees.
#define NOTHING {0x7fffffff, -1}

DEVICE Seen seen_from(int place, u32 window) {
    int low = window && (u32)place >= window ? place - (int)window + 1 : 0;
    return {low, place};
}

struct Score {
    f32 value, slope;
};

// The scaled and capped score, and the derivative of the capping.
DEVICE Score score_of(f32 product, const AttentionShape& shape) {
    f32 s = product * shape.scale;
    if (shape.softcap == 0) return {s, 1.0f};
    f32 t = tanhf(s / shape.softcap);
    return {shape.softcap * t, 1.0f - t * t};
}

struct Element {
    u32 row, place;
};

// Which of a thread's elements of a 16 × N tile dropout drops: bit 4 · n + k is of element [n][k]. at(n, k) is the
// place of an element: the key row of its query, and its key's place. A loop that is not unrolled keeps the random
// numbers' registers away from the tiles'.
template <int N, class F> DEVICE u32 dropped(const AttentionShape& shape, u32 head, F at) {
    static_assert(N <= 64, "a bit for each element");
    u32 bits = 0;
    if (shape.limit)
#pragma unroll 1
        for (u32 e = 0; e < N / 2; e++) {
            Element element = at(e / 4, e % 4);
            u32 word = random_word(shape.key, shape.site, (u64)element.row * shape.heads + head, element.place);
            bits |= (u32)(word < shape.limit) << e;
        }
    return bits;
}

// Writes 16 rows of a head; row_at(0) and row_at(1) are where the thread's two rows go, or null.
template <int D, class F> DEVICE void write_rows(const f32 (&c)[D / 8][4], u32 head_dim, F row_at) {
    u32 column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        f32* to = row_at(h);
        if (!to) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (u32 k = 0; k < 2; k++)
                if (n * 8 + column + k < head_dim) to[n * 8 + column + k] = c[n][2 * h + k];
    }
}

template <class V>
DEVICE void attention_forward(f32* o, f32* lse, const u16* q, const u16* kv, const u32* rows, const u32* tiles,
                              const AttentionShape& shape) {
    constexpr int D = V::D, PARTS = V::PARTS, ROWS = V::ROWS, N = V::FORWARD, THREADS = 2 * ROWS;
    const u32* t = tiles + blockIdx.x * 8;
    Range range = {t[0], t[1], t[2], t[3], t[4]};
    u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads), skipped = blockIdx.z * ROWS;
    if (skipped >= range.queries) return;
    u32 count = smaller((u32)ROWS, range.queries - skipped), first = range.first_query + skipped;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    DYNAMIC_SHARED(u16, q_tile);
    u16 *k_tile = q_tile + PARTS * ROWS * D, *v_tile = k_tile + PARTS * N * D;
    u64 q_plane = (u64)shape.queries * shape.heads * D, kv_plane = (u64)shape.keys * 2 * shape.kv_heads * D;
    const u16 *q_head = q + head * D, *k_head = kv + kv_head * D, *v_head = k_head + shape.kv_heads * D;
    u32 q_stride = shape.heads * D, kv_stride = 2 * shape.kv_heads * D;

    // All rows of the block, those of the warp, those of the thread. Rows ascend, and so do the places they see.
    int low = seen_from(range.query_place(rows, first), shape.window).low;
    int high = range.query_place(rows, first + count - 1);
    Seen of_warp = NOTHING, mine[2] = {NOTHING, NOTHING};
    if (warp * 16 < count) {
        of_warp.low = seen_from(range.query_place(rows, first + warp * 16), shape.window).low;
        of_warp.high = range.query_place(rows, first + smaller(warp * 16 + 16, count) - 1);
    }
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        u32 i = warp * 16 + lane / 4 + h * 8;
        if (i < count) mine[h] = seen_from(range.query_place(rows, first + i), shape.window);
    }

    auto key = [&](int start) {
        return [&range, start, high](u32 i) { return start + (int)i <= high ? range.key_row(start + i) : -1ll; };
    };
    auto element = [&](int start) {
        return [&, start](u32 n, u32 k) {
            u32 i = smaller(warp * 16 + lane / 4 + k / 2 * 8, count - 1);
            return Element{rows[first + i], start + n * 8 + lane % 4 * 2 + k % 2};
        };
    };
    int start = low / N * N;
    load_tile<D, PARTS, ROWS, THREADS>(q_tile, q_head, q_plane, q_stride,
                                       [&](u32 i) { return i < count ? (long long)(first + i) : -1ll; });
    load_tile<D, PARTS, N, THREADS>(k_tile, k_head, kv_plane, kv_stride, key(start));
    copies_end();

    f32 out[D / 8][4] = {}, max[2] = {-INFINITY_F32, -INFINITY_F32}, sum[2] = {};
    for (; start <= high; start += N) {
        copies_wait<0>();
        __syncthreads();
        load_tile<D, PARTS, N, THREADS>(v_tile, v_head, kv_plane, kv_stride, key(start));
        copies_end();
        bool active = start <= of_warp.high && start + N > of_warp.low;
        f32 s[N / 8][4];
        if (active) {
            scores_of<D, PARTS, ROWS, N>(s, q_tile, warp * 16, k_tile);
            f32 largest[2] = {max[0], max[1]};
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    int place = start + n * 8 + (int)(lane % 4 * 2) + k % 2;
                    bool sees = mine[k / 2].sees(place);
                    s[n][k] = sees ? score_of(s[n][k], shape).value * LOG2E : -INFINITY_F32;
                    largest[k / 2] = larger(largest[k / 2], s[n][k]);
                }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                // The four lanes of a row.
                largest[h] = larger(largest[h], shuffle_xor(largest[h], 1));
                largest[h] = larger(largest[h], shuffle_xor(largest[h], 2));
                // A row that has seen no key yet keeps its zeros.
                f32 base = largest[h] == -INFINITY_F32 ? 0.0f : largest[h];
                f32 factor = exp2f(max[h] - base), added = 0;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int k = 2 * h; k < 2 * h + 2; k++) {
                        s[n][k] = exp2f(s[n][k] - base);
                        added += s[n][k];
                    }
                max[h] = largest[h];
                sum[h] = sum[h] * factor + added;
#pragma unroll
                for (int n = 0; n < D / 8; n++) out[n][2 * h] *= factor, out[n][2 * h + 1] *= factor;
            }
            if (shape.limit) {
                u32 bits = dropped<N>(shape, head, element(start));
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int k = 0; k < 4; k++) s[n][k] *= bits >> (4 * n + k) & 1 ? 0.0f : shape.kept;
            }
        }
        copies_wait<0>();
        __syncthreads();
        if (start + N <= high) {
            load_tile<D, PARTS, N, THREADS>(k_tile, k_head, kv_plane, kv_stride, key(start + N));
            copies_end();
        }
        if (active) add_product<D, PARTS, N>(out, s, v_tile);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += shuffle_xor(sum[h], 1);
        sum[h] += shuffle_xor(sum[h], 2);
        f32 inverse = 1.0f / sum[h];
#pragma unroll
        for (int n = 0; n < D / 8; n++) out[n][2 * h] *= inverse, out[n][2 * h + 1] *= inverse;
        u32 i = warp * 16 + lane / 4 + h * 8;
        if (i < count && lane % 4 == 0) lse[(u64)(first + i) * shape.heads + head] = max[h] / LOG2E + logf(sum[h]);
    }
    write_rows<D>(out, shape.head_dim, [&](int h) {
        u32 i = warp * 16 + lane / 4 + h * 8;
        return i < count ? o + ((u64)(first + i) * shape.heads + head) * shape.head_dim : nullptr;
    });
}

template <class V>
DEVICE void attention_dq(f32* dq, const u16* q, const u16* kv, const u16* d_o, const f32* lse, const f32* delta,
                         const u32* rows, const u32* tiles, const AttentionShape& shape) {
    constexpr int D = V::D, PARTS = V::PARTS, ROWS = V::ROWS, N = V::BACKWARD, THREADS = 2 * ROWS;
    const u32* t = tiles + blockIdx.x * 8;
    Range range = {t[0], t[1], t[2], t[3], t[4]};
    u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads), skipped = blockIdx.z * ROWS;
    if (skipped >= range.queries) return;
    u32 count = smaller((u32)ROWS, range.queries - skipped), first = range.first_query + skipped;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    DYNAMIC_SHARED(u16, q_tile);
    u16* do_tile = q_tile + PARTS * ROWS * D;
    u16 *k_tile = do_tile + PARTS * ROWS * D, *v_tile = k_tile + PARTS * N * D;
    u64 q_plane = (u64)shape.queries * shape.heads * D, kv_plane = (u64)shape.keys * 2 * shape.kv_heads * D;
    const u16 *k_head = kv + kv_head * D, *v_head = k_head + shape.kv_heads * D;
    u32 q_stride = shape.heads * D, kv_stride = 2 * shape.kv_heads * D;

    int low = seen_from(range.query_place(rows, first), shape.window).low;
    int high = range.query_place(rows, first + count - 1);
    Seen of_warp = NOTHING, mine[2] = {NOTHING, NOTHING};
    if (warp * 16 < count) {
        of_warp.low = seen_from(range.query_place(rows, first + warp * 16), shape.window).low;
        of_warp.high = range.query_place(rows, first + smaller(warp * 16 + 16, count) - 1);
    }
    f32 log_sum[2] = {}, through[2] = {};
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        u32 i = warp * 16 + lane / 4 + h * 8;
        if (i >= count) continue;
        mine[h] = seen_from(range.query_place(rows, first + i), shape.window);
        log_sum[h] = lse[(u64)(first + i) * shape.heads + head] * LOG2E;
        through[h] = delta[(u64)(first + i) * shape.heads + head];
    }
    auto query = [&](u32 i) { return i < count ? (long long)(first + i) : -1ll; };
    load_tile<D, PARTS, ROWS, THREADS>(q_tile, q + head * D, q_plane, q_stride, query);
    load_tile<D, PARTS, ROWS, THREADS>(do_tile, d_o + head * D, q_plane, q_stride, query);

    f32 out[D / 8][4] = {};
    for (int start = low / N * N; start <= high; start += N) {
        auto key = [&](u32 i) { return start + (int)i <= high ? range.key_row(start + i) : -1ll; };
        // The last tile is no longer read.
        __syncthreads();
        load_tile<D, PARTS, N, THREADS>(k_tile, k_head, kv_plane, kv_stride, key);
        load_tile<D, PARTS, N, THREADS>(v_tile, v_head, kv_plane, kv_stride, key);
        copies_end();
        copies_wait<0>();
        __syncthreads();
        if (start > of_warp.high || start + N <= of_warp.low) continue;
        u32 bits = dropped<N>(shape, head, [&](u32 n, u32 k) {
            u32 i = smaller(warp * 16 + lane / 4 + k / 2 * 8, count - 1);
            return Element{rows[first + i], start + n * 8 + lane % 4 * 2 + k % 2};
        });
        f32 factor = shape.limit ? shape.kept : 1.0f;
        f32 s[N / 8][4], dp[N / 8][4];
        scores_of<D, PARTS, ROWS, N>(s, q_tile, warp * 16, k_tile);
        scores_of<D, PARTS, ROWS, N>(dp, do_tile, warp * 16, v_tile);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int place = start + n * 8 + (int)(lane % 4 * 2) + k % 2;
                f32 ds = 0;
                if (mine[k / 2].sees(place)) {
                    Score score = score_of(s[n][k], shape);
                    f32 p = exp2f(score.value * LOG2E - log_sum[k / 2]);
                    f32 d = dp[n][k] * (bits >> (4 * n + k) & 1 ? 0.0f : factor);
                    ds = p * (d - through[k / 2]) * score.slope * shape.scale;
                }
                s[n][k] = ds;
            }
        add_product<D, PARTS, N>(out, s, k_tile);
    }
    write_rows<D>(out, shape.head_dim, [&](int h) {
        u32 i = warp * 16 + lane / 4 + h * 8;
        return i < count ? dq + ((u64)(first + i) * shape.heads + head) * shape.head_dim : nullptr;
    });
}

// The first of the range's queries whose place is not below `place`; their number where there is none.
DEVICE u32 first_from(const Range& range, const u32* rows, int place) {
    u32 low = 0, high = range.queries;
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (range.query_place(rows, range.first_query + middle) < place) low = middle + 1;
        else high = middle;
    }
    return low;
}

template <class V>
DEVICE void attention_dkv(f32* dkv, const u16* q, const u16* kv, const u16* d_o, const f32* lse, const f32* delta,
                          const u32* rows, const u32* key_tiles, const u32* entries, const AttentionShape& shape) {
    constexpr int D = V::D, PARTS = V::PARTS, ROWS = V::ROWS, N = V::BACKWARD, THREADS = 2 * ROWS;
    const u32* t = key_tiles + blockIdx.x * 4;
    u32 kv_head = blockIdx.y, part = V::SPLIT ? blockIdx.z / 2 : blockIdx.z, skipped = part * ROWS;
    // Which gradient, where the block computes one of them.
    bool values = !V::SPLIT || blockIdx.z % 2, keys = !V::SPLIT || blockIdx.z % 2 == 0;
    if (skipped >= t[1]) return;
    u32 count = smaller((u32)ROWS, t[1] - skipped), first = t[0] + skipped;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    DYNAMIC_SHARED(u16, k_tile);
    u16* v_tile = k_tile + PARTS * ROWS * D;
    u16 *q_tile = v_tile + PARTS * ROWS * D, *do_tile = q_tile + PARTS * N * D;
    u64 q_plane = (u64)shape.queries * shape.heads * D, kv_plane = (u64)shape.keys * 2 * shape.kv_heads * D;
    const u16 *k_head = kv + kv_head * D, *v_head = k_head + shape.kv_heads * D;
    u32 q_stride = shape.heads * D, kv_stride = 2 * shape.kv_heads * D;
    auto key = [&](u32 i) { return i < count ? (long long)(first + i) : -1ll; };
    load_tile<D, PARTS, ROWS, THREADS>(k_tile, k_head, kv_plane, kv_stride, key);
    load_tile<D, PARTS, ROWS, THREADS>(v_tile, v_head, kv_plane, kv_stride, key);

    // dv and dk; a split block has one of them, in the first.
    f32 out[D / 8][4] = {}, out_keys[V::SPLIT ? 1 : D / 8][4] = {};
    u32 group = shape.heads / shape.kv_heads;
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (u32 e = t[2]; e < t[3]; e++) {
            const u32* entry = entries + (u64)e * 8;
            Range range = {entry[0], entry[1], 0, entry[3], entry[4]};
            // The places of the block's keys, and the queries that see one of them.
            int place = (int)(entry[2] + skipped), last = place + (int)count - 1;
            u32 query = first_from(range, rows, place);
            bool ends = shape.window && shape.window <= 0x7fffffffu - (u32)last;
            u32 end = ends ? first_from(range, rows, last + (int)shape.window) : range.queries;
            for (; query < end; query += N) {
                u32 queries = smaller((u32)N, end - query), first_query = range.first_query + query;
                auto row = [&](u32 i) { return i < queries ? (long long)(first_query + i) : -1ll; };
                __syncthreads();
                load_tile<D, PARTS, N, THREADS>(q_tile, q + head * D, q_plane, q_stride, row);
                load_tile<D, PARTS, N, THREADS>(do_tile, d_o + head * D, q_plane, q_stride, row);
                copies_end();
                copies_wait<0>();
                __syncthreads();
                // The last query sees farthest.
                bool active = warp * 16 < count &&
                              range.query_place(rows, first_query + queries - 1) >= place + (int)(warp * 16);
                if (!active) continue;
                u32 bits = dropped<N>(shape, head, [&](u32 n, u32 k) {
                    u32 i = smaller(n * 8 + lane % 4 * 2 + k % 2, queries - 1);
                    return Element{rows[first_query + i], place + warp * 16 + lane / 4 + k / 2 * 8};
                });
                f32 factor = shape.limit ? shape.kept : 1.0f;
                f32 s[N / 8][4], dp[N / 8][4];
                scores_of<D, PARTS, ROWS, N>(s, k_tile, warp * 16, q_tile);
                if (keys) scores_of<D, PARTS, ROWS, N>(dp, v_tile, warp * 16, do_tile);
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        u32 i = n * 8 + lane % 4 * 2 + j;
                        bool real = i < queries;
                        u32 of_query = first_query + (real ? i : 0);
                        Seen seen = seen_from(range.query_place(rows, of_query), shape.window);
                        f32 log_sum = lse[(u64)of_query * shape.heads + head] * LOG2E;
                        f32 through = delta[(u64)of_query * shape.heads + head];
#pragma unroll
                        for (int k = j; k < 4; k += 2) {
                            u32 of_key = warp * 16 + lane / 4 + k / 2 * 8;
                            int at = place + (int)of_key;
                            f32 p = 0, ds = 0;
                            if (real && of_key < count && seen.sees(at)) {
                                Score score = score_of(s[n][k], shape);
                                p = exp2f(score.value * LOG2E - log_sum);
                                f32 by = bits >> (4 * n + k) & 1 ? 0.0f : factor;
                                if (keys) ds = p * (by * dp[n][k] - through) * score.slope * shape.scale;
                                p *= by;
                            }
                            s[n][k] = p, dp[n][k] = ds;
                        }
                    }
                if constexpr (V::SPLIT) {
                    if (values) add_product<D, PARTS, N>(out, s, do_tile);
                    else add_product<D, PARTS, N>(out, dp, q_tile);
                } else {
                    add_product<D, PARTS, N>(out, s, do_tile);
                    add_product<D, PARTS, N>(out_keys, dp, q_tile);
                }
            }
        }
    auto row_at = [&](bool of_values) {
        return [=, &shape](int h) {
            u32 i = warp * 16 + lane / 4 + h * 8;
            u64 heads = 2 * shape.kv_heads, column = of_values ? shape.kv_heads + kv_head : kv_head;
            return i < count ? dkv + ((u64)(first + i) * heads + column) * shape.head_dim : nullptr;
        };
    };
    // Where no query sees the keys, nothing has waited for their copies: a thread must not end before them.
    copies_end();
    copies_wait<0>();
    write_rows<D>(out, shape.head_dim, row_at(values));
    if constexpr (!V::SPLIT) write_rows<D>(out_keys, shape.head_dim, row_at(false));
}

#define ATTENTION_KERNELS(suffix, variant, threads)                                                                    \
    BLOCK_KERNEL BOUNDS(threads, 1)                                                                                   \
        attention_forward_##suffix(f32* o, f32* lse, const u16* q, const u16* kv, const u32* rows, const u32* tiles,  \
                                   AttentionShape shape) {                                                            \
        attention_forward<variant>(o, lse, q, kv, rows, tiles, shape);                                                \
    }                                                                                                                 \
    BLOCK_KERNEL BOUNDS(threads, 1)                                                                                   \
        attention_dq_##suffix(f32* dq, const u16* q, const u16* kv, const u16* d_o, const f32* lse, const f32* delta, \
                              const u32* rows, const u32* tiles, AttentionShape shape) {                              \
        attention_dq<variant>(dq, q, kv, d_o, lse, delta, rows, tiles, shape);                                        \
    }                                                                                                                 \
    BLOCK_KERNEL BOUNDS(threads, 1)                                                                                   \
        attention_dkv_##suffix(f32* dkv, const u16* q, const u16* kv, const u16* d_o, const f32* lse,                 \
                               const f32* delta, const u32* rows, const u32* key_tiles, const u32* entries,           \
                               AttentionShape shape) {                                                                \
        attention_dkv<variant>(dkv, q, kv, d_o, lse, delta, rows, key_tiles, entries, shape);                         \
    }

typedef Variant<32, 1, 64, 64, 64> Bf16Of32;
typedef Variant<64, 1, 64, 64, 64> Bf16Of64;
typedef Variant<128, 1, 64, 64, 32> Bf16Of128;
typedef Variant<256, 1, 64, 32, 32> Bf16Of256;
typedef Variant<32, 3, 32, 32, 32> F32Of32;
typedef Variant<64, 3, 32, 32, 32> F32Of64;
typedef Variant<128, 3, 32, 32, 32> F32Of128;
typedef Variant<256, 3, 16, 16, 16> F32Of256;

ATTENTION_KERNELS(bf16_32, Bf16Of32, 128)
ATTENTION_KERNELS(bf16_64, Bf16Of64, 128)
ATTENTION_KERNELS(bf16_128, Bf16Of128, 128)
ATTENTION_KERNELS(bf16_256, Bf16Of256, 128)
ATTENTION_KERNELS(f32_32, F32Of32, 64)
ATTENTION_KERNELS(f32_64, F32Of64, 64)
ATTENTION_KERNELS(f32_128, F32Of128, 64)
ATTENTION_KERNELS(f32_256, F32Of256, 32)
