// loops.h for numbers of four and of eight bytes. BYTES is the size of a register.
namespace of_float {
#define REAL float
#define CODES 1
#define LANES (BYTES / 4)
#include "loops.h"
#undef LANES
#undef CODES
#undef REAL
}  // namespace of_float

namespace of_double {
#define REAL double
#define CODES 0
#define LANES (BYTES / 8)
#include "loops.h"
#undef LANES
#undef CODES
#undef REAL
}  // namespace of_double
