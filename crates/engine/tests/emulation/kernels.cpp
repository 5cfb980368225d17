// All kernels, compiled apart from the emulation so that only their own accesses to memory are checked.
#include "kernels.h"

#include "sources.inc"

#ifdef PLANT_FAULTS
#include "faults.h"

BLOCK_KERNEL fault_half_at_barrier(f32*) {
    if (threadIdx.x >= 32) __syncthreads();
}

BLOCK_KERNEL fault_lanes_apart(f32*) {
    if (threadIdx.x % 2) __syncwarp();
    else shuffle_xor(1.0f, 1);
}

BLOCK_KERNEL fault_ended_lanes(f32*) {
    if (threadIdx.x % 32 < 31) shuffle_xor(1.0f, 1);
}

KERNEL fault_undeclared_barrier(f32*) { __syncthreads(); }

BLOCK_KERNEL fault_unwritten(f32* y) {
    SHARED f32 cell;
    f32 before = cell;
    __syncthreads();
    cell = 1;
    y[blockIdx.x] = before;
}

BLOCK_KERNEL fault_shuffle_is_no_barrier(f32* y) {
    SHARED f32 cells[32];
    cells[threadIdx.x % 32] = 1;
    f32 other = shuffle_xor(0.0f, 1);
    y[threadIdx.x % 32] = cells[(threadIdx.x + 1) % 32] + other;
}

KERNEL fault_two_blocks(f32* y) {
    if (threadIdx.x == 0) y[0] = (f32)blockIdx.x;
}
#endif
