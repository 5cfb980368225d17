// Tiles of bf16 values in shared memory, and their products on tensor cores.
#pragma once
#include "common.cuh"

// Where 8 columns of a row lie in a tile. Rows are rotated against each other, so that eight rows of a matrix lie in
// different banks.
template <int D> DEVICE u32 in_tile(u32 row, u32 chunk) {
    u32 turn = D == 32 ? row / 2 % 4 : row % 8;
    return row * D + (chunk ^ turn) * 8;
}

// The address that a lane gives for four matrices whose rows begin at `tile`: row `row` of 16 and one of two
// neighbouring chunks, of which the first is at(chunk). Few registers: the rest is known when this is compiled.
template <int D> struct LaneAddress {
    const u16* row;
    u32 turn;

    DEVICE_METHOD LaneAddress(const u16* tile, u32 in_rows, u32 second)
        : row(tile + in_rows * D), turn((second ^ (D == 32 ? in_rows / 2 % 4 : in_rows % 8)) * 8) {}

    DEVICE_METHOD const u16* at(u32 rows, u32 chunk) const { return row + rows * D + (chunk & ~7u) * 8 + ((chunk & 7) * 8 ^ turn); }
};

// c += a · b, smallest terms first. b0 and b1 are of columns 0 to 7, b2 and b3 of columns 8 to 15.
template <int PARTS> DEVICE void multiply_parts(f32 (&c0)[4], f32 (&c1)[4], const u32 (&a)[PARTS][4],
                                                const u32 (&b)[PARTS][4]) {
#pragma unroll
    for (int order = PARTS - 1; order >= 0; order--)
#pragma unroll
        for (int i = 0; i <= order; i++) {
            mma(c0, a[i], b[order - i][0], b[order - i][1]);
            mma(c1, a[i], b[order - i][2], b[order - i][3]);
        }
}
