// Snapshot format, little-endian: Header, then each column's first `num_seeds` values without
// padding, in the order of for_each_column. The checksum is XXH64 of the header, whose checksum
// field holds meanwhile that of everything after the header: fold64, in version 2 XXH64.

#include <algorithm>
#include <cstring>
#include <string>

#include "esper/checksum.h"
#include "esper/errors.h"
#include "esper/state_layout.h"

namespace esper {
namespace {

constexpr char kMagic[8] = {'E', 'S', 'P', 'R', 'S', 'E', 'E', 'D'};
constexpr std::uint32_t kVersion = 3;
constexpr std::uint32_t kOldestVersion = 2;  // 1 had no windows, and health counts of 8 bytes

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t bytes_per_seed;
  std::uint64_t num_seeds;
  std::uint64_t checksum;
};
static_assert(sizeof(Header) == 32);

std::size_t payload_bytes_per_seed() noexcept {
  return StateLayout::bytes_per_seed() - sizeof(std::uint32_t);  // sequence counters are not state
}

std::uint64_t checksum_of(Header header, std::span<const std::byte> payload) noexcept {
  header.checksum = header.version == kVersion ? fold64(payload) : xxh64(payload);
  return xxh64(std::as_bytes(std::span(&header, 1)));
}

Header checked_header(std::span<const std::byte> bytes) {
  Header header;
  if (bytes.size() < sizeof header) {
    throw CorruptData("snapshot must be at least " + std::to_string(sizeof header) +
                      " bytes long, got " + std::to_string(bytes.size()));
  }
  std::memcpy(&header, bytes.data(), sizeof header);
  if (!std::equal(std::begin(kMagic), std::end(kMagic), std::begin(header.magic))) {
    throw CorruptData("snapshot must begin with the magic ESPRSEED, got other bytes");
  }
  if (header.version < kOldestVersion || header.version > kVersion) {
    throw CorruptData("snapshot must have a version from " + std::to_string(kOldestVersion) +
                      " to " + std::to_string(kVersion) + ", got " +
                      std::to_string(header.version));
  }
  const std::span<const std::byte> payload = bytes.subspan(sizeof header);
  if (header.bytes_per_seed != payload_bytes_per_seed() ||
      header.num_seeds != payload.size() / header.bytes_per_seed ||
      payload.size() % header.bytes_per_seed != 0) {
    throw CorruptData("snapshot must hold " + std::to_string(payload_bytes_per_seed()) +
                      " bytes for each of its " + std::to_string(header.num_seeds) +
                      " seeds, got " + std::to_string(payload.size()) + " bytes in all");
  }
  if (header.checksum != checksum_of(header, payload)) {
    throw CorruptData("snapshot must match its checksum, got damaged bytes");
  }
  return header;
}

}  // namespace

std::vector<std::byte> StateLayout::snapshot() const {
  std::vector<std::byte> bytes(snapshot_size());
  snapshot_into(bytes);
  return bytes;
}

std::size_t StateLayout::snapshot_size() const noexcept {
  return sizeof(Header) + num_seeds() * payload_bytes_per_seed();
}

void StateLayout::snapshot_into(std::span<std::byte> bytes) const noexcept {
  const std::size_t size = num_seeds();
  std::byte* at = bytes.data() + sizeof(Header);
  for_each_column(columns_, [&]<class T>(std::span<T> column) {
    std::memcpy(at, column.data(), size * sizeof(T));
    at += size * sizeof(T);
  });
  Header header{};
  std::copy(std::begin(kMagic), std::end(kMagic), std::begin(header.magic));
  header.version = kVersion;
  header.bytes_per_seed = static_cast<std::uint32_t>(payload_bytes_per_seed());
  header.num_seeds = size;
  header.checksum = checksum_of(header, bytes.subspan(sizeof header));
  std::memcpy(bytes.data(), &header, sizeof header);
}

void StateLayout::restore(std::span<const std::byte> bytes) {
  const Header header = checked_header(bytes);
  const std::size_t size = header.num_seeds;
  if (size > capacity_) {
    throw CapacityExceeded("snapshot must hold at most the capacity of " +
                           std::to_string(capacity_) + " seeds, got " + std::to_string(size));
  }
  if (size < num_seeds()) {
    throw InvalidState("snapshot must hold at least the layout's " + std::to_string(num_seeds()) +
                       " seeds, got " + std::to_string(size));
  }
  const std::byte* at = bytes.data() + sizeof header;
  const bool states_valid = std::all_of(at, at + size, [](std::byte state) {
    return is_seed_state(std::to_integer<std::uint8_t>(state)) && state != std::byte{0};
  });
  if (!states_valid) throw CorruptData("snapshot must hold known seed states, got another number");

  // Column by column, so each reader is kept out of all seeds until every column is in place.
  for (std::size_t seed = 0; seed < size; ++seed) {
    const std::atomic_ref<std::uint32_t> sequence(sequences_[seed]);
    sequence.store(sequence.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  for_each_column(columns_, [&]<class T>(std::span<T> column) {
    for (std::size_t seed = 0; seed < size; ++seed, at += sizeof(T)) {
      T value;
      std::memcpy(&value, at, sizeof value);
      std::atomic_ref<T>(column[seed]).store(value, std::memory_order_release);
    }
  });
  for (std::size_t seed = 0; seed < size; ++seed) {
    const std::atomic_ref<std::uint32_t> sequence(sequences_[seed]);
    sequence.store(sequence.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  num_seeds_.store(size, std::memory_order_release);
}

}  // namespace esper
