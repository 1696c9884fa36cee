// Products of the backward that become ready before there is time for them. Compiled in namespace
// VF_LEVEL.
#pragma once

#include <assert.h>

#include "common/products.h"
#include "common/sizes.h"

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// Products that wait to run beside a unit, in the order in which units to come write over what they
// read. Never more than MOST.
template <int MOST>
class Waiting {
 public:
  void add(const Product& product, int64_t overwritten) {
    assert(begin_ == end_ || overwritten_[end_ - 1] <= overwritten);
    products_[end_] = product, overwritten_[end_++] = overwritten;
  }

  // Moves to `list` those that must run beside the n-th unit, because the next one writes over what
  // they read, and more up to a unit's share of all slices. Returns how many.
  int take(int64_t n, int64_t share, Product* list) {
    int count = 0;
    for (due_ += share; begin_ < end_ && (due_ > 0 || overwritten_[begin_] <= n + 1); begin_++) {
      due_ -= products_[begin_].depth;
      list[count++] = products_[begin_];
    }
    if (begin_ == end_) due_ = minimum(due_, 0);
    if (begin_ >= end_ - begin_) move_to_front();
    return count;
  }

  int take_all(Product* list) { return take(INT64_MAX - 1, 0, list); }

 private:
  void move_to_front() {
    for (int n = begin_; n < end_; n++)
      products_[n - begin_] = products_[n], overwritten_[n - begin_] = overwritten_[n];
    end_ -= begin_, begin_ = 0;
  }

  Product products_[2 * MOST];
  int64_t overwritten_[2 * MOST];  // the number of the unit that does it
  int begin_ = 0, end_ = 0;
  int64_t due_ = 0;  // slices
};

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast
