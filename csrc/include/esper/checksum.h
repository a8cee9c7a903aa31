// Checksums: they guard snapshots against damage, not against an adversary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace esper {

// XXH64 (xxHash by Y. Collet, public specification), seed 0.
[[nodiscard]] std::uint64_t xxh64(std::span<const std::byte> data) noexcept;

// Folded multiplication, after wyhash (W. Yi, public domain), in four lanes: one multiplication of
// 64 by 64 bits for 16 bytes, where XXH64 has two for 8. Data are read as blocks of 64 bytes, the
// last one filled with zeros; their length counts.
[[nodiscard]] std::uint64_t fold64(std::span<const std::byte> data) noexcept;

}  // namespace esper
