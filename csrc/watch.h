// Tensors held together with where and how they lie in memory, to be asked at once whether that has changed.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace epi {

class Watches {
 public:
  int64_t add(const std::vector<torch::stable::Tensor>& tensors) {
    Watched watched(tensors);
    const std::lock_guard lock(mutex_);
    watched_.emplace(++last_, std::move(watched));
    return last_;
  }

  void remove(int64_t number) {
    Watched released;  // after the lock
    const std::lock_guard lock(mutex_);
    const auto found = watched_.find(number);
    if (found == watched_.end()) return;
    released = std::move(found->second);
    watched_.erase(found);
  }

  // False for a number that is not, or no longer, watched.
  bool unmoved(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = watched_.find(number);
    return found != watched_.end() && found->second.unmoved();
  }

 private:
  struct Layout {
    void* address = nullptr;
    int32_t dtype = 0;
    int64_t dim = 0;
    int64_t *sizes = nullptr, *strides = nullptr;  // the tensor's own

    explicit Layout(AtenTensorHandle tensor) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
    }
  };

  // Layouts lie side by side: hundreds of tensors are asked in every step.
  class Watched {
   public:
    Watched() = default;
    explicit Watched(const std::vector<torch::stable::Tensor>& tensors) : tensors_(tensors) {
      for (const auto& tensor : tensors_) {
        const Layout layout(tensor.get());
        notes_.push_back({layout.address, layout.dtype, layout.dim});
        extents_.insert(extents_.end(), layout.sizes, layout.sizes + layout.dim);
        extents_.insert(extents_.end(), layout.strides, layout.strides + layout.dim);
      }
    }
    bool unmoved() const {
      const int64_t* extent = extents_.data();
      for (size_t i = 0; i < tensors_.size(); ++i) {
        const Layout now(tensors_[i].get());
        const Note& then = notes_[i];
        if (now.address != then.address || now.dtype != then.dtype || now.dim != then.dim) return false;
        if (!std::equal(now.sizes, now.sizes + now.dim, extent)) return false;
        if (!std::equal(now.strides, now.strides + now.dim, extent + now.dim)) return false;
        extent += 2 * now.dim;
      }
      return true;
    }

   private:
    struct Note {
      const void* address;
      int32_t dtype;
      int64_t dim;
    };
    std::vector<torch::stable::Tensor> tensors_;
    std::vector<Note> notes_;
    std::vector<int64_t> extents_;  // sizes, then strides, of each in turn
  };
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
