// Half-precision numbers as bare bits: CUDA's own headers for the two types would double the time
// that a file takes to compile. Private to csrc/cuda.
#pragma once

namespace esper {

struct Half {
  unsigned short bits;
};
struct Brain {
  unsigned short bits;
};

__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}
__device__ inline float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
__device__ inline float widen(Brain value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16U);
}

// To nearest even.
__device__ inline void narrow(float value, float& to) {
  to = value;
}
__device__ inline void narrow(float value, Half& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}
__device__ inline void narrow(float value, Brain& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

}  // namespace esper
