// Tensors held together with where and how they lie in memory, to be asked at once whether that has changed.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace epi {

class Watches {
 public:
  int64_t add(const std::vector<torch::stable::Tensor>& tensors) {
    Watched watched;
    for (const auto& tensor : tensors) watched.emplace_back(tensor, Layout(tensor));
    const std::lock_guard lock(mutex_);
    watched_.emplace(++last_, std::move(watched));
    return last_;
  }

  void remove(int64_t number) {
    Watched released;  // after the lock
    const std::lock_guard lock(mutex_);
    const auto found = watched_.find(number);
    if (found == watched_.end()) return;
    released.swap(found->second);
    watched_.erase(found);
  }

  // False for a number that is not, or no longer, watched.
  bool unmoved(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = watched_.find(number);
    if (found == watched_.end()) return false;
    for (const auto& [tensor, layout] : found->second) {
      if (!layout.is_of(tensor)) return false;
    }
    return true;
  }

 private:
  struct Layout {
    const void* address;
    torch::headeronly::ScalarType dtype;
    std::vector<int64_t> sizes, strides;

    explicit Layout(const torch::stable::Tensor& tensor)
        : address(tensor.data_ptr()), dtype(tensor.scalar_type()) {
      for (int64_t i = 0; i < tensor.dim(); ++i) {
        sizes.push_back(tensor.size(i));
        strides.push_back(tensor.stride(i));
      }
    }
    bool is_of(const torch::stable::Tensor& tensor) const {
      const int64_t dim = static_cast<int64_t>(sizes.size());
      if (tensor.data_ptr() != address || tensor.scalar_type() != dtype || tensor.dim() != dim) return false;
      for (int64_t i = 0; i < dim; ++i) {
        if (tensor.size(i) != sizes[i] || tensor.stride(i) != strides[i]) return false;
      }
      return true;
    }
  };
  using Watched = std::vector<std::pair<torch::stable::Tensor, Layout>>;
  std::mutex mutex_;
  std::map<int64_t, Watched> watched_;
  int64_t last_ = 0;
};

// Never destroyed: at the process's end torch may go first.
inline Watches& watches() {
  static Watches& all = *new Watches;
  return all;
}

}  // namespace epi
