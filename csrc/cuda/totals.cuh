// The sum of the losses of all rows, and of their weights, by the kernel that computes the losses: whoever comes last
// adds up. In double, and in an order that depends on nothing but the input: not on who comes first.
//
// Every unit (a row, or the rows of a block) writes its share. Units are taken in groups. A counter of each group says
// who was its last unit: that warp adds up the group's shares. The last of the groups adds up the groups.
#pragma once

#include "group.cuh"

namespace softmax_ext {
namespace cuda {

struct Totals {
  double loss = 0, weight = 0;
  DEVICE void merge(const Totals& other) {
    loss += other.loss;
    weight += other.weight;
  }
};

// So that there are about as many groups as units in a group.
inline unsigned total_group_size(int64_t units) {
  unsigned size = kWarp;
  while (int64_t{size} * size < units) size *= 2;
  return size;
}

// As a kernel is told of it. No losses are summed where `shares` is null.
struct LossTotal {
  Totals* shares;      // [units], and behind them [groups]
  unsigned* counters;  // [groups + 1], all 0
  unsigned units, group_size, groups;
  LossSum to;

  // By whole warps; `has` says which of their threads bring the share of a unit.
  DEVICE void add(const Totals& share, unsigned unit, bool has) const {
    if (shares) publish_and_sum(share.loss, share.weight, unit, has);
  }

 private:
  SOFTMAX_EXT_KERNEL_CALL void publish_and_sum(double loss, double weight, unsigned unit, bool has) const {
    const unsigned own = unit / group_size;
    bool last = false;
    if (has) last = publish(shares + unit, {loss, weight}, counters + own, min(group_size, units - own * group_size));
    for (unsigned lanes = __ballot_sync(kAllLanes, last); lanes != 0; lanes &= lanes - 1) {
      const unsigned group = __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(lanes)) - 1);
      unsigned begin = group * group_size, end = min(units, begin + group_size);
#pragma unroll 1
      for (bool all = false;; all = true) {
        const Totals total = summed(begin, end);
        const bool first_lane = threadIdx.x % kWarp == 0;
        if (all && first_lane) finish(total);
        if (all) break;
        last = first_lane && publish(shares + units + group, total, counters + groups, groups);
        if (!__any_sync(kAllLanes, last)) break;
        begin = units, end = units + groups;
      }
    }
  }

  // Whether this was the last of `expected`.
  DEVICE static bool publish(Totals* to, const Totals& share, unsigned* counter, unsigned expected) {
    *to = share;
    __threadfence();  // whoever sees the counter sees the share
    return atomicAdd(counter, 1u) + 1 == expected;
  }

  // Of shares [begin, end), in all lanes.
  DEVICE Totals summed(unsigned begin, unsigned end) const {
    __syncwarp();
    __threadfence();
    Totals total;
#pragma unroll 1
    for (unsigned i = begin + threadIdx.x % kWarp; i < end; i += kWarp)
      total.merge({__ldcg(&shares[i].loss), __ldcg(&shares[i].weight)});
    reduce_lanes(total, kWarp);
    return total;
  }

  DEVICE void finish(const Totals& total) const {
    if (to.mean && !to.has_denominator) *to.denominator = total.weight;
    const double divisor = !to.mean ? 1 : to.has_denominator ? *to.denominator : total.weight;
    store_value(total.loss / divisor, to.loss, to.loss_type, 0);
  }
};

}  // namespace cuda
}  // namespace softmax_ext
