#include "esper/cpu_backend.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

#include "esper/errors.h"

namespace esper {
namespace {

thread_local bool is_worker = false;

std::exception_ptr outcome_of(const CpuBackend::Task& task) noexcept {
  try {
    task();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

class CpuBackend::Worker {
 public:
  ~Worker() { close(); }

  void submit(Task task) {
    {
      const std::lock_guard lock(mutex_);
      if (closing_) throw InvalidState("stream must be open, got a closed one");
      tasks_.push_back(std::move(task));
      ++num_submitted_;
      if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    }
    changed_.notify_one();
  }

  std::uint64_t num_submitted() {
    const std::lock_guard lock(mutex_);
    return num_submitted_;
  }

  void wait_until_done(std::uint64_t ticket) const noexcept {
    std::uint64_t done = num_done_.load(std::memory_order_acquire);
    while (done < ticket) {
      num_done_.wait(done, std::memory_order_acquire);
      done = num_done_.load(std::memory_order_acquire);
    }
  }

  void close() noexcept {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void work() noexcept {
    is_worker = true;
    while (true) {
      Task task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
      task = nullptr;  // what the task owns is gone before anybody hears that it is done
      num_done_.fetch_add(1, std::memory_order_release);
      num_done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::uint64_t num_submitted_ = 0;
  bool closing_ = false;
  std::atomic<std::uint64_t> num_done_{0};
  std::thread thread_;
};

CpuBackend::CpuBackend(std::size_t num_streams) {
  if (num_streams == 0 || num_streams > 256) {
    throw InvalidInput("num_streams", "be between 1 and 256", std::to_string(num_streams));
  }
  for (std::size_t i = 0; i < num_streams; ++i) workers_.push_back(std::make_unique<Worker>());
}

CpuBackend::~CpuBackend() {
  close();
}

std::size_t CpuBackend::num_streams() const noexcept {
  return workers_.size();
}

CpuBackend::Event CpuBackend::record(Stream stream) {
  if (stream == kAmbient) return {kAmbient, 0};
  return {stream, workers_[stream]->num_submitted()};
}

void CpuBackend::wait(Stream stream, const Event& event) {
  // A stream never waits for itself: it runs in order anyway.
  if (event.stream == kAmbient || event.stream == stream) return;
  const Worker& awaited = *workers_[event.stream];
  if (stream == kAmbient) return awaited.wait_until_done(event.ticket);
  submit(stream, [&awaited, ticket = event.ticket] { awaited.wait_until_done(ticket); });
}

void CpuBackend::submit(Stream stream, Task task) {
  workers_[stream]->submit(std::move(task));
}

bool CpuBackend::on_worker_thread() noexcept {
  return is_worker;
}

void CpuBackend::close() noexcept {
  for (const std::unique_ptr<Worker>& worker : workers_) worker->close();
}

std::vector<std::exception_ptr> run_all(StreamDispatcher<CpuBackend>& dispatcher,
                                        std::span<const CpuBackend::Task> tasks) {
  std::vector<std::exception_ptr> errors(tasks.size());
  if (tasks.empty()) return errors;
  if (CpuBackend::on_worker_thread()) {
    for (std::size_t i = 0; i < tasks.size(); ++i) errors[i] = outcome_of(tasks[i]);
    return errors;
  }
  const auto streams = dispatcher.fork(CpuBackend::kAmbient, tasks.size());
  std::exception_ptr refused;
  try {
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      dispatcher.backend().submit(
          streams[i], [&task = tasks[i], &error = errors[i]] { error = outcome_of(task); });
    }
  } catch (...) {
    refused =
        std::current_exception();  // closed meanwhile: `close` itself finishes what was submitted
  }
  for (const CpuBackend::Stream stream : streams) {
    dispatcher.backend().wait(CpuBackend::kAmbient, dispatcher.backend().record(stream));
  }
  if (refused) std::rethrow_exception(refused);
  return errors;
}

}  // namespace esper
