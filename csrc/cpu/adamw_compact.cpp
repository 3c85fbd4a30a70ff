// The kernels of adamw_ for compact values.
#include "adamw.h"

template sk::cpu::AdamwRun sk::cpu::adamw_kernel<true>(const AdamwTask&, ScalarType, ScalarType, ScalarType);
