#include "esper/single_flight.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <latch>
#include <vector>

namespace esper {
namespace {

using namespace std::chrono_literals;
using Flights = SingleFlight<int>;

TEST(SingleFlight, LoadsOnceForAllWhoAskMeanwhile) {
  constexpr int kFollowers = 7;
  Flights flights;
  Flights::Ticket lead = flights.join("key");
  ASSERT_TRUE(lead.leads());
  std::latch joined(kFollowers);
  std::vector<std::future<int>> followers;
  for (int i = 0; i < kFollowers; ++i) {
    followers.push_back(std::async(std::launch::async, [&] {
      Flights::Ticket ticket = flights.join("key");
      EXPECT_FALSE(ticket.leads());
      joined.count_down();
      return ticket.wait();
    }));
  }
  joined.wait();
  lead.complete(42);
  for (auto& follower : followers) EXPECT_EQ(follower.get(), 42);
}

TEST(SingleFlight, AFailureReachesEveryWaiterAndIsNotRemembered) {
  Flights flights;
  std::latch joined(1);
  Flights::Ticket lead = flights.join("key");
  auto follower = std::async(std::launch::async, [&] {
    Flights::Ticket ticket = flights.join("key");
    joined.count_down();
    return ticket.wait();
  });
  joined.wait();
  lead.fail(std::make_exception_ptr(std::out_of_range("gone")));
  EXPECT_THROW(follower.get(), std::out_of_range);
  EXPECT_TRUE(flights.join("key").leads());
}

TEST(SingleFlight, AnAbandonedLeadFailsTheLoad) {
  Flights flights;
  std::latch joined(1);
  std::future<int> follower;
  {
    const Flights::Ticket lead = flights.join("key");
    follower = std::async(std::launch::async, [&] {
      Flights::Ticket ticket = flights.join("key");
      joined.count_down();
      return ticket.wait();
    });
    joined.wait();
  }
  EXPECT_THROW(follower.get(), std::runtime_error);
}

TEST(SingleFlight, ALeaderCannotWaitForItself) {
  Flights flights;
  const Flights::Ticket lead = flights.join("key");
  EXPECT_THROW((void)flights.join("key"), InvalidState);
  EXPECT_TRUE(flights.join("other").leads());
}

TEST(SingleFlight, WaitingHasALimit) {
  Flights flights;
  Flights::Ticket lead = flights.join("key");
  std::async(std::launch::async, [&] {
    Flights::Ticket ticket = flights.join("key");
    EXPECT_FALSE(ticket.wait_for(1ms));
  }).get();
  lead.complete(1);
}

TEST(SingleFlight, ManyThreadsAgreeOnEachRound) {
  Flights flights;
  std::atomic<int> loads{0};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 500; ++round) {
        const int key = round % 3;
        Flights::Ticket ticket = flights.join(std::to_string(key));
        if (ticket.leads()) {
          ++loads;
          ticket.complete(key);
        } else if (ticket.wait() != key) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_GT(loads.load(), 0);
}

}  // namespace
}  // namespace esper
