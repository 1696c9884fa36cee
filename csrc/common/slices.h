// Products cut into slices that stand between vector instructions: a matrix unit and the vector
// units then work at the same time. Where registers multiply, products are done whole, and first.
// Compiled in namespace VF_LEVEL.
#pragma once

#include "products.h"

#if VF_PRODUCTS

namespace vatt_fast {
namespace VF_LEVEL {
namespace {

// Sums that the last product left in tiles 0 to 3. They are stored while the next one is
// multiplied, each tile right before it is needed: a store right behind its product would wait for
// it, and with it every later store.
struct Pending {
  float* sums = nullptr;
  int64_t stride = 0;
};

#if VF_PRODUCTS == 2

inline void store(Pending& pending) {
  if (pending.sums) store_sums({.sums = pending.sums, .stride = pending.stride});
  pending = {};
}

// Products in their order. A slice is 32 of a product's depth: four tile products, with their loads
// and at the product's beginning the stores of the last one's sums.
class Slices {
 public:
  Slices(const Product* products, int count, const Pending& pending)
      : next_(products), end_(products + count), pending_(pending) {
    for (const Product* product = products; product < end_; product++) left_over_ += product->depth;
    // It stays in memory. Otherwise gcc keeps some of it in vector registers, and moves from there
    // take the port that the vectors' products need.
    __asm__ volatile("" ::"r"(this) : "memory");
    begin_product();
  }

  int64_t left_over() const { return left_over_; }

  // All slices but so many.
  inline __attribute__((always_inline)) void leave(int64_t slices) {
    while (left_over_ > slices) multiply<0>(), multiply<1>(), multiply<2>(), multiply<3>();
  }

  // The n-th of a slice's tile products; nothing where no slice is left over.
  template <int n>
  inline __attribute__((always_inline)) void multiply() {
    if (left_over_ == 0) return;
    if constexpr (n == 0) {
      _tile_loadd(4, left_, product_->factors.left_stride * 2);
      load_right_6(right_, product_->factors.streamed);
    } else if constexpr (n == 1) {
      load_right_7(right_ + product_->factors.right_column, product_->factors.streamed);
    } else if constexpr (n == 2) {
      const int64_t stride = product_->factors.left_stride;
      _tile_loadd(5, left_ + 16 * stride, stride * 2);
    }
    if (begins_) begin_sums<n>();
    if constexpr (n == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (n == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (n == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (n == 3) {
      _tile_dpbf16ps(3, 5, 7);
      end_slice();
    }
  }

  // To be stored by the next slices, or by store().
  const Pending& pending() const { return pending_; }

 private:
  template <int n>
  inline __attribute__((always_inline)) void begin_sums() {
    constexpr int row = n / 2 * 16, column = n % 2 * 16;
    const int64_t stride = product_->stride;
    const float* sums = product_->sums + row * stride + column;
    float* stored = pending_.sums + row * pending_.stride + column;
#define VF_BEGIN_SUMS(tile)                                             \
  if constexpr (n == tile) {                                            \
    if (pending_.sums) _tile_stored(tile, stored, pending_.stride * 4); \
    if (product_->fresh)                                                \
      _tile_zero(tile);                                                 \
    else                                                                \
      _tile_loadd(tile, sums, stride * 4);                              \
  }
    VF_BEGIN_SUMS(0)
    VF_BEGIN_SUMS(1)
    VF_BEGIN_SUMS(2)
    VF_BEGIN_SUMS(3)
#undef VF_BEGIN_SUMS
  }

  inline __attribute__((always_inline)) void end_slice() {
    left_over_--;
    if (begins_) pending_ = {product_->sums, product_->stride};
    begins_ = false;
    if (--depth_ == 0) return begin_product();
    left_ += product_->factors.left_next;
    right_ += product_->factors.right_next;
  }

  inline __attribute__((always_inline)) void begin_product() {
    if (next_ == end_) return;
    product_ = next_++;
    left_ = product_->factors.left, right_ = product_->factors.right;
    depth_ = product_->depth;
    begins_ = true;
  }

  const Product *product_ = nullptr, *next_, *end_;
  const uint16_t *left_ = nullptr, *right_ = nullptr;  // of the slice
  int64_t depth_ = 0, left_over_ = 0;                  // slices of the product; of all
  bool begins_ = false;                                // the product, with this slice
  Pending pending_;
};

#else

inline void store(Pending&) {}

class Slices {
 public:
  Slices(const Product* products, int count, const Pending&) {
    for (int n = 0; n < count; n++) VF_LEVEL::multiply(products[n]);
  }
  int64_t left_over() const { return 0; }
  void leave(int64_t) {}
  template <int n>
  void multiply() {}
  Pending pending() const { return {}; }
};

#endif

// Products with nothing beside them; the last one's sums are pending.
inline void multiply(const Product* products, int count, Pending& pending) {
  Slices slices(products, count, pending);
  slices.leave(0);
  pending = slices.pending();
}

}  // namespace
}  // namespace VF_LEVEL
}  // namespace vatt_fast

#endif  // VF_PRODUCTS
