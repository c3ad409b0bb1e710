// AVX2 and FMA.
#include "linear.h"

namespace hfq {

const Variant* avx2_variant() { return nullptr; }

}  // namespace hfq
