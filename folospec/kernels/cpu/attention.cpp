// The loops of attention for each type of KV, a translation unit of their own.
#include "attention.h"

namespace folospec {

void attend_part(const AttentionStep& s, const Pages& pages, const float* queries, int64_t query_stride,
                 const Operand& out, int64_t part, int64_t parts) {
    static thread_local Unit unit;
    int64_t fold = s.heads / s.kv_heads, rows = 1;
    for (int64_t g = 0; g < s.groups; g++)
        rows = std::max<int64_t>(rows, s.group_start[g + 1] - s.group_start[g]);
    // Of very many query heads per KV head, some run after the others.
    int64_t turns = (fold + MAX_QUERIES - 1) / MAX_QUERIES;
    int64_t heads = std::max<int64_t>(1, MAX_QUERIES / (rows * fold));
    int64_t ranges = std::max((s.kv_heads + heads - 1) / heads,
                              std::min(s.kv_heads, (parts + s.groups - 1) / s.groups));
    for (int64_t i = part; i < s.groups * ranges * turns; i += parts) {
        int64_t group = i / turns / ranges, range = i / turns % ranges, first = i % turns * MAX_QUERIES;
        Work work = {s.group_start[group], s.group_start[group + 1], s.kv_heads * range / ranges,
                     s.kv_heads * (range + 1) / ranges, (int)std::min<int64_t>(fold - first, MAX_QUERIES),
                     (int)first};
        if (s.kv_format == BFLOAT16)
            attend_unit<BFloat16KV>(s, pages, work, queries, query_stride, out, unit);
        else
            attend_unit<Float32KV>(s, pages, work, queries, query_stride, out, unit);
    }
}

}  // namespace folospec
