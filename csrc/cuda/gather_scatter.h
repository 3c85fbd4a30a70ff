// Launchers of gather and scatter_. They return what went wrong, or null.
#pragma once
#include "types.h"

namespace sk::cuda {

// out[k] = source[positions[k]]; a position stands for `bytes` neighbouring bytes.
const char* launch_gather(
    const void* source,  // [positions.limit * bytes]
    void* out,           // [positions.count * bytes]
    const Positions& positions, int64_t bytes, void* stream);

// target[positions[k]] = values[k]; likewise.
const char* launch_scatter(
    void* target,        // [positions.limit * bytes]
    const void* values,  // [positions.count * bytes]
    const Positions& positions, int64_t bytes, void* stream);

}  // namespace sk::cuda
