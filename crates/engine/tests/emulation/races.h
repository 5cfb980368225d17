// Finds races of kernels: two accesses to the same memory, one of them a write, by threads between which no barrier
// lies. The compiler's instrumentation (-fsanitize=thread) calls the emulation for each access; no library of the
// sanitizer is linked. Order comes from __syncthreads within a block and from __syncwarp within a warp, and from nothing
// else: not from shuffles, not between blocks.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>

// The kernels are compiled with it; the emulation itself never is.
#ifndef CHECKS_RACES
#define CHECKS_RACES 0
#endif

namespace emulation {

struct Access {
    uint32_t block, thread, block_epoch, warp_epoch;
    bool writes, real;
};

class Races {
    // The last write of four bytes, and of the reads since, two of different threads.
    struct Cell {
        Access write, reads[2];
    };

    std::unordered_map<uintptr_t, Cell> cells;
    Access first, second;
    bool both_write;

    static bool ordered(const Access& a, const Access& b) {
        if (!a.real) return true;
        if (a.block != b.block) return false;
        if (a.thread == b.thread || a.block_epoch != b.block_epoch) return true;
        return a.thread / 32 == b.thread / 32 && a.warp_epoch != b.warp_epoch;
    }

    bool race(const Access& a, const Access& b, bool writes) {
        if (ordered(a, b)) return false;
        first = a, second = b, both_write = writes && a.writes;
        return true;
    }

public:
    uint32_t block_epoch = 0, warp_epochs[32] = {};

    // A new launch.
    void clear() { cells.clear(); }

    // Epochs of different blocks are never compared.
    void new_block() { block_epoch = 0; }

    // True where the access and an earlier one are a race.
    bool access(uintptr_t at, uint32_t bytes, bool writes, uint32_t block, uint32_t thread) {
        Access now = {block, thread, block_epoch, warp_epochs[thread / 32], writes, true};
        // Smaller values than four bytes have cells of their own: kernels never mix the two.
        uintptr_t size = bytes < 4 ? 1 : 4, of_size = bytes < 4;
        for (uintptr_t place = at / size; place <= (at + bytes - 1) / size; place++) {
            Cell& cell = cells[place * 2 + of_size];
            if (race(cell.write, now, writes)) return true;
            if (writes) {
                if (race(cell.reads[0], now, false) || race(cell.reads[1], now, false)) return true;
                cell.write = now;
                cell.reads[0].real = cell.reads[1].real = false;
            } else if (ordered(cell.reads[0], now)) {
                cell.reads[0] = now;
            } else {
                cell.reads[1] = now;
            }
        }
        return false;
    }

    std::string description() const {
        auto of = [](const Access& a) { return std::to_string(a.thread) + " of block " + std::to_string(a.block); };
        return "a race: threads " + of(first) + " and " + of(second) +
               (both_write ? " write" : " read and write") + " the same memory without a barrier between them";
    }
};

}  // namespace emulation
