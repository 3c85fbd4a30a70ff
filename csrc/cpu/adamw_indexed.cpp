// The kernels of adamw_ for dense parameters at positions.
#include "adamw.h"

template sk::cpu::AdamwRun sk::cpu::adamw_kernel<false>(const AdamwTask&, ScalarType, ScalarType, ScalarType);
