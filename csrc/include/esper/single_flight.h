// One load per key, however many threads ask for it at once.
//
// The first to `join` a key leads and must complete or fail its ticket; who joins meanwhile waits
// for that outcome. A key is free again as soon as its outcome is known, so a failure is not
// remembered. Thread-safe.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>

#include "esper/errors.h"

namespace esper {

template <class Value>
class SingleFlight {
  struct Flight {
    std::thread::id leader;
    std::mutex mutex;
    std::condition_variable landed;
    std::optional<Value> value;
    std::exception_ptr error;
  };

 public:
  // One caller's part in a load. A leader's ticket that dies unfinished fails the load. REQUIRES:
  // the SingleFlight outlives it.
  class Ticket {
   public:
    Ticket(SingleFlight& owner, std::string key, std::shared_ptr<Flight> flight, bool leads)
        : owner_(&owner), key_(std::move(key)), flight_(std::move(flight)), leads_(leads) {}
    Ticket(Ticket&& other) noexcept
        : owner_(other.owner_),
          key_(std::move(other.key_)),
          flight_(std::move(other.flight_)),
          leads_(std::exchange(other.leads_, false)) {}
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
    Ticket& operator=(Ticket&&) = delete;
    ~Ticket() {
      if (leads_) fail(std::make_exception_ptr(std::runtime_error("the load was abandoned")));
    }

    [[nodiscard]] bool leads() const noexcept { return leads_; }

    // REQUIRES: leads(). Both end the lead.
    void complete(Value value) {
      finish([&](Flight& flight) { flight.value.emplace(std::move(value)); });
    }
    void fail(std::exception_ptr error) {
      finish([&](Flight& flight) { flight.error = std::move(error); });
    }

    // Whether the outcome is there within `limit`.
    [[nodiscard]] bool wait_for(std::chrono::milliseconds limit) {
      std::unique_lock lock(flight_->mutex);
      return flight_->landed.wait_for(lock, limit, [this] { return has_landed(); });
    }

    // Waits for the outcome; throws what the leader failed with. REQUIRES: this thread does not
    // lead.
    [[nodiscard]] Value wait() {
      std::unique_lock lock(flight_->mutex);
      flight_->landed.wait(lock, [this] { return has_landed(); });
      if (flight_->error) std::rethrow_exception(flight_->error);
      return *flight_->value;
    }

   private:
    [[nodiscard]] bool has_landed() const { return flight_->value || flight_->error; }

    template <class Store>
    void finish(Store&& store) {
      leads_ = false;
      owner_->forget(key_);
      const std::lock_guard lock(flight_->mutex);
      store(*flight_);
      flight_->landed.notify_all();
    }

    SingleFlight* owner_;
    std::string key_;
    std::shared_ptr<Flight> flight_;
    bool leads_;
  };

  // Throws InvalidState where this thread already leads the key: it would wait for itself.
  [[nodiscard]] Ticket join(std::string_view key) {
    const std::lock_guard lock(mutex_);
    const auto [place, leads] = flights_.try_emplace(std::string(key));
    if (leads) {
      place->second = std::make_shared<Flight>();
      place->second->leader = std::this_thread::get_id();
    } else if (place->second->leader == std::this_thread::get_id()) {
      throw InvalidState("key must not be asked for by its own loader, got '" + std::string(key) +
                         "'");
    }
    return Ticket(*this, place->first, place->second, leads);
  }

 private:
  void forget(const std::string& key) {
    const std::lock_guard lock(mutex_);
    flights_.erase(key);
  }

  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<Flight>> flights_;
};

}  // namespace esper
