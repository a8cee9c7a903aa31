// One block looks at the whole sample: a few thousand values need no more, and one block needs no
// second pass over blocks. Every sum is taken in a fixed order, so the same tensor gives the same
// figures.

#include "bare_floats.h"
#include "probe_kernel.h"

namespace esper {
namespace {

constexpr unsigned kThreads = 256;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  __device__ double operator()(double a, double b) const { return b < a ? b : a; }
};
struct Greatest {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

// Combines one value of each thread in a tree; every thread gets the result.
template <class T, class Combine>
__device__ T reduce(T value, T* shared, Combine combine) {
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[0];
}

template <class T, class Visit>
__device__ void for_each_finite(const T* data, std::size_t numel, std::size_t count,
                                Visit&& visit) {
  for (std::size_t i = threadIdx.x; i < count; i += kThreads) {
    const double value = widen(data[probe_index(i, count, numel)]);
    if (isfinite(value)) visit(value);
  }
}

template <class T>
__global__ void probe_kernel(const T* data, std::size_t numel, std::size_t count,
                             ProbeMoments* result) {
  __shared__ double doubles[kThreads];
  __shared__ unsigned long long integers[kThreads];
  __shared__ unsigned bins[kProbeBins];
  if (threadIdx.x < kProbeBins) bins[threadIdx.x] = 0;

  double sum = 0;
  double low = INFINITY;
  double high = -INFINITY;
  unsigned long long num_finite = 0;
  unsigned long long num_dead = 0;
  for_each_finite(data, numel, count, [&](double value) {
    sum += value;
    low = value < low ? value : low;
    high = value > high ? value : high;
    num_finite += 1;
    num_dead += value == 0 ? 1 : 0;
  });
  num_finite = reduce(num_finite, integers, Add{});
  num_dead = reduce(num_dead, integers, Add{});
  low = reduce(low, doubles, Least{});
  high = reduce(high, doubles, Greatest{});
  const double mean = reduce(sum, doubles, Add{}) / static_cast<double>(num_finite);

  const ProbeBinning binning = ProbeBinning::of(low, high);
  double squares = 0;
  for_each_finite(data, numel, count, [&](double value) {
    squares += (value - mean) * (value - mean);
    atomicAdd(&bins[binning.bin(value)], 1U);
  });
  squares = reduce(squares, doubles, Add{});  // its barriers also close the bins

  if (threadIdx.x < kProbeBins) result->bins[threadIdx.x] = bins[threadIdx.x];
  if (threadIdx.x == 0) {
    result->count = count;
    result->num_finite = num_finite;
    result->num_dead = num_dead;
    result->mean = mean;
    result->squares = squares;
  }
}

template <class T>
cudaError_t launch(const void* data, std::size_t numel, std::size_t count, ProbeMoments* result,
                   cudaStream_t stream) noexcept {
  probe_kernel<T><<<1, kThreads, 0, stream>>>(static_cast<const T*>(data), numel, count, result);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_probe(const void* data, std::size_t numel, std::size_t count, DType dtype,
                         ProbeMoments* result, cudaStream_t stream) noexcept {
  switch (dtype) {
    case DType::FLOAT32:
      return launch<float>(data, numel, count, result, stream);
    case DType::FLOAT16:
      return launch<Half>(data, numel, count, result, stream);
    case DType::BFLOAT16:
      return launch<Brain>(data, numel, count, result, stream);
    case DType::FLOAT64:
      return launch<double>(data, numel, count, result, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace esper
