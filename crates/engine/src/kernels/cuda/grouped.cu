// Linear layers of a mixture of experts, whose offsets only the card knows: each block finds its expert and its tile.
//
// A block computes 64 × 64 results, a warp 16 rows of them. Factors are f32 or the types of files; they become bf16 parts
// on their way into shared memory, and the next tiles are fetched while the present ones are multiplied. Sums are in the
// order of the terms, so the bytes depend on nothing else.
#include "tiles.cuh"

// Rows and columns of results, and terms that are in shared memory at once.
#define SIDE 64
#define DEPTH 32
#define GROUPED_THREADS 128

struct Expert {
    u32 number, first, count, tile;
};

// The expert whose tile a block has, `tile` among its own; its count is 0 where there is none. All threads take part.
DEVICE Expert expert_of(u32 block, const u32* offsets, u32 experts) {
    u32 lane = threadIdx.x % 32, before = 0;
    for (u32 base = 0; base < experts; base += 32) {
        u32 e = base + lane, first = 0, count = 0;
        if (e < experts) {
            first = offsets[e];
            u32 end = offsets[e + 1];
            count = end > first ? end - first : 0;
        }
        u32 tiles = (count + SIDE - 1) / SIDE, until = tiles;
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            u32 x = shuffle_up(until, distance);
            if (lane >= distance) until += x;
        }
        u32 here = ballot(block < before + until);
        if (here) {
            u32 from = __popc((here & (0u - here)) - 1);
            u32 start = before + shuffle(until, from) - shuffle(tiles, from);
            return {base + from, shuffle(first, from), shuffle(count, from), block - start};
        }
        before += shuffle(until, 31);
    }
    return {0, 0, 0, 0};
}

// Four values of a row of weights from column `at` on, of which `count` are there.
DEVICE Four weights_at(const GroupedPiece* pieces, u32 row, u32 at, u32 count) {
    while (row >= pieces->end) pieces++;
    u64 start = (u64)(row - pieces->start) * pieces->stride + at;
    if (pieces->kind == 0) return load((const f32*)pieces->address + start, count);
    FourHalves x = load((const u16*)pieces->address + start, count);
    Four y;
#pragma unroll
    for (int k = 0; k < 4; k++) y.v[k] = pieces->kind == 1 ? from_bf16(x.v[k]) : from_f16(x.v[k]);
    return y;
}

// Four values of row `row` of rows, zeros where there is none.
DEVICE Four row_at(const f32* x, u32 row, u32 rows, u32 width, u32 at) {
    if (row >= rows || at >= width) return Four{};
    return load(x + (u64)row * width + at, width - at);
}

// Of four neighbouring values of a tile: its row and its first column. A tile has 64 rows of 32 terms, or, TURNED, 32
// terms of 64 columns.
template <bool TURNED> struct Quad {
    u32 row, column;

    DEVICE_METHOD Quad(u32 number) {
        u32 i = threadIdx.x + number * GROUPED_THREADS, in_row = (TURNED ? SIDE : DEPTH) / 4;
        row = i / in_row, column = i % in_row * 4;
    }
};

template <bool TURNED, int PARTS> DEVICE void put(u16* tile, u32 number, Four x) {
    constexpr int D = TURNED ? SIDE : DEPTH;
    Quad<TURNED> quad(number);
    u16* to = tile + in_tile<D>(quad.row, quad.column / 8) + quad.column % 8;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        FourHalves y;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            y.v[k] = to_bf16(x.v[k]);
            x.v[k] -= from_bf16(y.v[k]);
        }
        *(FourHalves*)(to + part * SIDE * DEPTH) = y;
    }
}

// c[64, 64] = Σ over `terms` of a · b; a_at(row, term) and b_at(column, term) give four values along the tile's rows:
// terms, or where it is TURNED rows or columns. write(row, column, value) gets the results.
template <bool A_TURNED, bool B_TURNED, int PARTS, class A, class B, class W>
DEVICE void multiply_tiles(u32 terms, A a_at, B b_at, W write) {
    DYNAMIC_SHARED(u16, a);
    u16* b = a + PARTS * SIDE * DEPTH;
    constexpr int QUADS = SIDE * DEPTH / 4 / GROUPED_THREADS;
    constexpr int OF_A = A_TURNED ? SIDE : DEPTH, OF_B = B_TURNED ? SIDE : DEPTH;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    f32 c[SIDE / 8][4] = {};
    Four next_a[QUADS], next_b[QUADS];
    auto fetch = [&](u32 from) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            Quad<A_TURNED> of_a(i);
            Quad<B_TURNED> of_b(i);
            next_a[i] = A_TURNED ? a_at(of_a.column, from + of_a.row) : a_at(of_a.row, from + of_a.column);
            next_b[i] = B_TURNED ? b_at(of_b.column, from + of_b.row) : b_at(of_b.row, from + of_b.column);
        }
    };
    LaneAddress<OF_A> in_a(A_TURNED ? a : a + warp * 16 * DEPTH, A_TURNED ? matrix / 2 * 8 + r : matrix % 2 * 8 + r,
                           A_TURNED ? matrix % 2 : matrix / 2);
    LaneAddress<OF_B> in_b(b, B_TURNED ? matrix % 2 * 8 + r : matrix / 2 * 8 + r, B_TURNED ? matrix / 2 : matrix % 2);
    if (terms) fetch(0);
    for (u32 from = 0; from < terms; from += DEPTH) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            put<A_TURNED, PARTS>(a, i, next_a[i]);
            put<B_TURNED, PARTS>(b, i, next_b[i]);
        }
        __syncthreads();
        if (from + DEPTH < terms) fetch(from + DEPTH);
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
            u32 x[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                if (A_TURNED) load_transposed(x[part], in_a.at(part * DEPTH + k * 16, warp * 2));
                else load_matrices(x[part], in_a.at(part * SIDE, k * 2));
            }
#pragma unroll
            for (int n = 0; n < SIDE / 16; n++) {
                u32 y[PARTS][4];
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    if (B_TURNED) load_transposed(y[part], in_b.at(part * DEPTH + k * 16, n * 2));
                    else load_matrices(y[part], in_b.at(part * SIDE + n * 16, k * 2));
                }
                multiply_parts<PARTS>(c[2 * n], c[2 * n + 1], x, y);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < SIDE / 8; n++)
#pragma unroll
        for (u32 k = 0; k < 4; k++) write(warp * 16 + lane / 4 + k / 2 * 8, n * 8 + lane % 4 * 2 + k % 2, c[n][k]);
}

// y[slots, columns] = x[slots, terms] · w[expert]ᵀ, where w is [columns, terms], or where it is TURNED [terms, columns].
template <bool TURNED, int PARTS>
DEVICE void grouped(f32* y, const f32* x, const GroupedPiece* weights, u32 pieces, const u32* offsets, u32 experts,
                    u32 columns, u32 terms) {
    Expert expert = expert_of(blockIdx.x, offsets, experts);
    if (!expert.count) return;
    weights += (u64)expert.number * pieces;
    u32 row = expert.tile * SIDE, column = blockIdx.y * SIDE;
    x += (u64)expert.first * terms, y += (u64)expert.first * columns;
    multiply_tiles<false, TURNED, PARTS>(
        terms, [&](u32 i, u32 term) { return row_at(x, row + i, expert.count, terms, term); },
        [&](u32 j, u32 term) {
            if (column + j >= columns || term >= terms) return Four{};
            return TURNED ? weights_at(weights, term, column + j, columns - column - j)
                          : weights_at(weights, column + j, term, terms - term);
        },
        [&](u32 i, u32 j, f32 value) {
            if (row + i < expert.count && column + j < columns) y[(u64)(row + i) * columns + column + j] = value;
        });
}

template <int PARTS>
DEVICE void grouped_dw(f32* dw, u32 first, u32 rows, u32 accumulate, const f32* dy, const f32* x, const u32* offsets,
                       u32 experts, u32 outputs, u32 inputs) {
    // Of the expert's outputs, those from `low` up to `high` are among the rows.
    u32 expert = first / outputs + blockIdx.z;
    if (expert >= experts) return;
    u64 own = (u64)expert * outputs, end = (u64)first + rows;
    u32 low = own < first ? (u32)(first - own) : 0, high = own + outputs < end ? outputs : (u32)(end - own);
    u32 row = low + blockIdx.y * SIDE, column = blockIdx.x * SIDE;
    if (row >= high) return;
    u32 slot = offsets[expert], until = offsets[expert + 1], count = until > slot ? until - slot : 0;
    dy += (u64)slot * outputs, x += (u64)slot * inputs;
    multiply_tiles<true, true, PARTS>(
        count, [&](u32 i, u32 term) { return row_at(dy, term, count, outputs, row + i); },
        [&](u32 j, u32 term) { return row_at(x, term, count, inputs, column + j); },
        [&](u32 i, u32 j, f32 value) {
            if (row + i >= high || column + j >= inputs) return;
            f32* to = dw + (own + row + i - first) * inputs + column + j;
            *to = accumulate ? *to + value : value;
        });
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_linear_bf16(f32* y, const f32* x, const GroupedPiece* weights,
    u32 pieces, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped<false, 1>(y, x, weights, pieces, offsets, experts, outputs, inputs);
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_linear_f32(f32* y, const f32* x, const GroupedPiece* weights,
    u32 pieces, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped<false, 3>(y, x, weights, pieces, offsets, experts, outputs, inputs);
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_dx_bf16(f32* dx, const f32* dy, const GroupedPiece* weights,
    u32 pieces, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped<true, 1>(dx, dy, weights, pieces, offsets, experts, inputs, outputs);
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_dx_f32(f32* dx, const f32* dy, const GroupedPiece* weights,
    u32 pieces, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped<true, 3>(dx, dy, weights, pieces, offsets, experts, inputs, outputs);
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_dw_bf16(f32* dw, u32 first, u32 rows, u32 accumulate, const f32* dy,
    const f32* x, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped_dw<1>(dw, first, rows, accumulate, dy, x, offsets, experts, outputs, inputs);
}

BLOCK_KERNEL BOUNDS(GROUPED_THREADS, 3) grouped_dw_f32(f32* dw, u32 first, u32 rows, u32 accumulate, const f32* dy,
    const f32* x, const u32* offsets, u32 experts, u32 outputs, u32 inputs) {
    grouped_dw<3>(dw, first, rows, accumulate, dy, x, offsets, experts, outputs, inputs);
}
