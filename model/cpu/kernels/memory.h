// Memory that operations reuse from call to call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>

namespace {

// A buffer that grows and is never returned; growing loses its contents.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      bytes = std::max(bytes, 2 * size_);  // grow seldom, since growing fragments the heap
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) std::abort();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
