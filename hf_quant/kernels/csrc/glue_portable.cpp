// What lies between the products of a decoder layer, compiled for whatever the compiler assumes.
#include "glue_math.h"

namespace hfq {
const Glue* portable_glue() { return &kGlue; }
}  // namespace hfq
