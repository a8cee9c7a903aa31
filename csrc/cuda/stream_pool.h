// Streams of the process that are lent out and come back, by device and priority. Private to
// csrc/cuda.
//
// No stream is ever destroyed: an allocator that was told of one (record_stream) marks the end of
// its work when the memory is freed, which may be long after the backend that lent it was closed,
// and autograd replays nodes on the streams of their forward. What a stream still has to do when it
// is lent again only adds order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_try.h"

namespace esper {

// Thread-safe.
class StreamPool {
 public:
  // Lives until the process ends: a stream may be given back by a destructor of static life.
  static StreamPool& of_process() {
    static StreamPool& pool = *std::make_unique<StreamPool>().release();
    return pool;
  }

  // A stream that does not wait for the legacy default stream. REQUIRES: the device is current and
  // the priority is in its range. Throws DeviceError.
  cudaStream_t take(int device, int priority) {
    const std::lock_guard lock(mutex_);
    Shelf& shelf = shelves_[{device, priority}];
    if (!shelf.idle.empty()) {
      const cudaStream_t stream = shelf.idle.back();
      shelf.idle.pop_back();
      return stream;
    }
    shelf.idle.reserve(shelf.num_made + 1);  // so that giving back allocates nothing
    cudaStream_t stream = nullptr;
    CUDA_TRY(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority));
    ++shelf.num_made;
    return stream;
  }

  void give_back(int device, int priority, cudaStream_t stream) noexcept {
    const std::lock_guard lock(mutex_);
    shelves_.find({device, priority})->second.idle.push_back(stream);
  }

 private:
  struct Shelf {
    std::vector<cudaStream_t> idle;
    std::size_t num_made = 0;
  };

  std::mutex mutex_;
  std::map<std::pair<int, int>, Shelf> shelves_;
};

// A stream of the pool, given back at the end of its life.
class LentStream {
 public:
  LentStream(int device, int priority)
      : device_(device),
        priority_(priority),
        stream_(StreamPool::of_process().take(device, priority)) {}
  LentStream(LentStream&& other) noexcept
      : device_(other.device_),
        priority_(other.priority_),
        stream_(std::exchange(other.stream_, nullptr)) {}
  LentStream(const LentStream&) = delete;
  LentStream& operator=(const LentStream&) = delete;
  LentStream& operator=(LentStream&&) = delete;
  ~LentStream() {
    if (stream_ != nullptr) StreamPool::of_process().give_back(device_, priority_, stream_);
  }

  [[nodiscard]] cudaStream_t get() const noexcept { return stream_; }

 private:
  int device_;
  int priority_;
  cudaStream_t stream_;
};

}  // namespace esper
