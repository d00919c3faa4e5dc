// The loops of attention for each type of KV, a translation unit of their own.
#include "attention.h"

namespace folospec {

void attend_one(const AttentionStep& s, const Pages& pages, const float* queries, int64_t query_stride,
                const Operand& out, const Work& work) {
    static thread_local Unit unit;
    if (s.kv_format == BFLOAT16) attend_unit<BFloat16KV>(s, pages, work, queries, query_stride, out, unit);
    else attend_unit<Float32KV>(s, pages, work, queries, query_stride, out, unit);
}

}  // namespace folospec
