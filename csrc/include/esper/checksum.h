// XXH64 (xxHash by Y. Collet, public specification), seed 0: guards snapshots against damage, not
// against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace esper {

[[nodiscard]] std::uint64_t xxh64(std::span<const std::byte> data) noexcept;

}  // namespace esper
