// Kernels that are wrong, for the emulation's own test.
#pragma once
#include "cuda.cuh"

// Half of the threads wait at a barrier.
BLOCK_KERNEL fault_half_at_barrier(f32*);
// The lanes of a warp meet in different operations.
BLOCK_KERNEL fault_lanes_apart(f32*);
// Lanes wait for one that has ended.
BLOCK_KERNEL fault_ended_lanes(f32*);
// A barrier in a kernel whose threads are said to be independent.
KERNEL fault_undeclared_barrier(f32*);
// y[block] = shared memory that nobody has written.
BLOCK_KERNEL fault_unwritten(f32* y);
// A lane reads what another one of its warp writes, with a shuffle between, which orders no memory.
BLOCK_KERNEL fault_shuffle_is_no_barrier(f32* y);
// Two blocks write the same element.
KERNEL fault_two_blocks(f32* y);
