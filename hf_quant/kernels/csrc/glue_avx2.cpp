// What lies between the products of a decoder layer, compiled for AVX2.
#if defined(__AVX2__)
#include "glue_math.h"

namespace hfq {
const Glue* avx2_glue() { return &kGlue; }
}  // namespace hfq
#else
#include "glue.h"

namespace hfq {
const Glue* avx2_glue() { return nullptr; }
}  // namespace hfq
#endif
