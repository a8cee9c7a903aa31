// The hash of a key; private to the cache's sources. The same in every process, so that what a
// cache keeps does not depend on who runs it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace esper {

// 64 x 64 -> 128 bits, folded: every bit of the result depends on every bit of both.
[[nodiscard]] inline std::uint64_t folded_product(std::uint64_t a, std::uint64_t b) noexcept {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64U);
}

// Sixteen bytes a step, with wyhash's multiplication (Wang Yi, public domain). The steps wait for
// nothing but the salt of their place, so a kernel's id costs little more than one of them. Not
// made against keys chosen to collide.
[[nodiscard]] inline std::size_t hash_of_key(std::string_view key) noexcept {
  constexpr std::uint64_t kFirst = 0xA0761D6478BD642FULL;
  constexpr std::uint64_t kSecond = 0xE7037ED1A0B428DBULL;
  const char* data = key.data();
  std::size_t left = key.size();
  std::uint64_t salt = kFirst ^ key.size();
  std::uint64_t state = 0;
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  for (; left > 16; left -= 16, data += 16, salt += kSecond) {
    std::memcpy(&low, data, 8);
    std::memcpy(&high, data + 8, 8);
    state += folded_product(low ^ salt, high ^ kSecond);
  }
  low = high = 0;
  if (key.size() > 16) {  // the last sixteen bytes, some of them once more
    std::memcpy(&low, data + left - 16, 8);
    std::memcpy(&high, data + left - 8, 8);
  } else {
    if (left > 0) std::memcpy(&low, data, std::min<std::size_t>(left, 8));
    if (left > 8) std::memcpy(&high, data + 8, left - 8);
  }
  return state + folded_product(low ^ salt, high ^ kSecond);
}

}  // namespace esper
