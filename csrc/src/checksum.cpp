#include "esper/checksum.h"

#include <bit>
#include <cstring>

namespace esper {
namespace {

static_assert(std::endian::native == std::endian::little, "the core's formats are little-endian");

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9ULL;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

template <class Word>
Word load(const std::byte* at) noexcept {
  Word word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

std::uint64_t round(std::uint64_t lane, std::uint64_t word) noexcept {
  return std::rotl(lane + word * kPrime2, 31) * kPrime1;
}

std::uint64_t merge(std::uint64_t hash, std::uint64_t lane) noexcept {
  return (hash ^ round(0, lane)) * kPrime1 + kPrime4;
}

std::uint64_t consume_stripes(const std::byte*& at, const std::byte* end) noexcept {
  std::uint64_t lanes[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
  for (; end - at >= 32; at += 32) {
    for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], load<std::uint64_t>(at + 8 * i));
  }
  std::uint64_t hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
                       std::rotl(lanes[3], 18);
  for (const std::uint64_t lane : lanes) hash = merge(hash, lane);
  return hash;
}

std::uint64_t consume_tail(std::uint64_t hash, const std::byte* at, const std::byte* end) noexcept {
  for (; end - at >= 8; at += 8) {
    hash = std::rotl(hash ^ round(0, load<std::uint64_t>(at)), 27) * kPrime1 + kPrime4;
  }
  if (end - at >= 4) {
    hash = std::rotl(hash ^ load<std::uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at != end; ++at) {
    hash = std::rotl(hash ^ std::to_integer<std::uint64_t>(*at) * kPrime5, 11) * kPrime1;
  }
  return hash;
}

constexpr std::uint64_t kSecrets[4] = {0xA0761D6478BD642FULL, 0xE7037ED1A0B428DBULL,
                                       0x8EBC6AF09C88C6E3ULL, 0x589965CC75374CC3ULL};
constexpr std::ptrdiff_t kBlock = 64;

__extension__ using Product = unsigned __int128;

std::uint64_t fold(std::uint64_t a, std::uint64_t b) noexcept {
  const Product product = static_cast<Product>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

struct Lanes {
  std::uint64_t a = kSecrets[0], b = kSecrets[1], c = kSecrets[2], d = kSecrets[3];

  void take(const std::byte* at) noexcept {
    a = fold(word(at, 0) ^ kSecrets[0], word(at, 1) ^ a);
    b = fold(word(at, 2) ^ kSecrets[1], word(at, 3) ^ b);
    c = fold(word(at, 4) ^ kSecrets[2], word(at, 5) ^ c);
    d = fold(word(at, 6) ^ kSecrets[3], word(at, 7) ^ d);
  }

  static std::uint64_t word(const std::byte* at, int number) noexcept {
    return load<std::uint64_t>(at + 8 * number);
  }
};

}  // namespace

std::uint64_t fold64(std::span<const std::byte> data) noexcept {
  Lanes lanes;
  const std::byte* at = data.data();
  const std::byte* end = at + data.size();
  for (; end - at >= kBlock; at += kBlock) lanes.take(at);
  if (at != end) {
    std::byte last[kBlock] = {};
    std::memcpy(last, at, static_cast<std::size_t>(end - at));
    lanes.take(last);
  }
  std::uint64_t hash = fold(data.size() ^ kSecrets[0], kSecrets[1]);
  for (const std::uint64_t lane : {lanes.a, lanes.b, lanes.c, lanes.d}) {
    hash = fold(hash ^ lane ^ kSecrets[2], kSecrets[3]);
  }
  return hash;
}

std::uint64_t xxh64(std::span<const std::byte> data) noexcept {
  const std::byte* at = data.data();
  const std::byte* end = at + data.size();
  std::uint64_t hash = data.size() >= 32 ? consume_stripes(at, end) : kPrime5;
  hash = consume_tail(hash + data.size(), at, end);
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace esper
