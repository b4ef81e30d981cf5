// The kernels for AVX-512 with BF16 and VNNI; the flags of its compiler are in pyproject.toml.
#include "kernels.h"
