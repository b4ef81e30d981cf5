// The kernels for AVX2 with FMA; the flags of its compiler are in pyproject.toml.
#include "kernels.h"
