// Tensors held together with their addresses, to be asked at once whether any of them has moved.

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
    for (const auto& tensor : tensors) watched.emplace_back(tensor, tensor.data_ptr());
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
    for (const auto& [tensor, address] : found->second) {
      if (tensor.data_ptr() != address) return false;
    }
    return true;
  }

 private:
  using Watched = std::vector<std::pair<torch::stable::Tensor, void*>>;
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
