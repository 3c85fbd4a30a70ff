// Launchers of gather and scatter_. They return what went wrong, or null.
#pragma once
#include "../rules/units.h"
#include "types.h"

namespace sk::cuda {

// compact = the units of dense at the positions, elements of `item` bytes; zero where a unit is cut off.
const char* launch_gather(
    const void* dense,  // [units.limit units]
    void* compact,      // [positions.count, height, width], or [height, positions.count] of columns
    const Positions& positions, const Units& units, int64_t item, void* stream);

// The units of dense at the positions = compact, likewise; what is cut off is left out.
const char* launch_scatter(
    void* dense, const void* compact, const Positions& positions, const Units& units, int64_t item, void* stream);

}  // namespace sk::cuda
