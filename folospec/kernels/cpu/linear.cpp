// The products of a weight of each format: a translation unit of its own, since it takes half of the time.
#include "linear.h"

namespace folospec {

void linear_part(const Matrix& m, const Operand& x, float* y, int64_t y_stride, int64_t begin,
                 int64_t end, bool add) {
    switch (m.format) {
        case FLOAT32: return linear_range<Float32Weight>(m, x, y, y_stride, begin, end, add);
        case BFLOAT16: return linear_range<BFloat16Weight>(m, x, y, y_stride, begin, end, add);
        case INT8: return linear_range<Int8Weight>(m, x, y, y_stride, begin, end, add);
    }
}

}  // namespace folospec
