// What lies between the products of a decoder layer, compiled for AVX-512.
#if defined(__AVX512F__)
#include "glue_math.h"

namespace hfq {
const Glue* avx512_glue() { return &kGlue; }
}  // namespace hfq
#else
#include "glue.h"

namespace hfq {
const Glue* avx512_glue() { return nullptr; }
}  // namespace hfq
#endif
