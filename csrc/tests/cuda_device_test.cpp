// What needs a device: the same suites that the CPU's backends pass, on CUDA streams and memory.
// Skipped with a reason where there is none.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "blend_contract.h"
#include "dispatcher_contract.h"
#include "esper/cuda_backend.h"

namespace esper {
namespace {

using Dispatcher = StreamDispatcher<CudaBackend>;

std::string no_device() {
  return cuda_available() ? "" : "needs a CUDA device: there is no driver or it sees none";
}

void must(cudaError_t error) {
  if (error != cudaSuccess) throw DeviceError(cudaGetErrorName(error));
}

cudaStream_t raw(CudaBackend::Stream stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

struct DeviceMemory {
  explicit DeviceMemory(std::size_t num_bytes) {
    must(cudaMalloc(&address, num_bytes));
    must(cudaMemset(address, 0, num_bytes));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { (void)cudaFree(address); }

  void* address = nullptr;
};

struct OneStream {
  OneStream() { must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  OneStream(const OneStream&) = delete;
  OneStream& operator=(const OneStream&) = delete;
  ~OneStream() { (void)cudaStreamDestroy(stream); }

  cudaStream_t stream = nullptr;
};

// The ambient stream is one of its own, as in torch.cuda.stream(...): nothing else orders it.
struct CudaFixture {
  using Cell = std::shared_ptr<DeviceMemory>;

  static std::string skip() { return no_device(); }
  static std::unique_ptr<Dispatcher> make(std::size_t num_streams) {
    return std::make_unique<Dispatcher>(std::make_unique<CudaBackend>(num_streams, 0, 0));
  }
  CudaBackend::Stream ambient() {
    if (!own) own = std::make_unique<OneStream>();
    return reinterpret_cast<CudaBackend::Stream>(own->stream);
  }
  static Cell cell(Dispatcher&) { return std::make_shared<DeviceMemory>(1); }
  static void fill(Dispatcher&, CudaBackend::Stream stream, const Cell& to, unsigned char value) {
    must(cudaMemsetAsync(to->address, value, 1, raw(stream)));
  }
  static void copy(Dispatcher&, CudaBackend::Stream stream, const Cell& from, const Cell& to) {
    must(cudaMemcpyAsync(to->address, from->address, 1, cudaMemcpyDeviceToDevice, raw(stream)));
  }
  static void delay(Dispatcher&, CudaBackend::Stream stream) {
    must(cudaLaunchHostFunc(raw(stream), [](void*) { keep_busy(); }, nullptr));
  }
  unsigned char value(Dispatcher&, const Cell& cell) {
    unsigned char found = 0;
    must(cudaMemcpyAsync(&found, cell->address, 1, cudaMemcpyDeviceToHost, raw(ambient())));
    must(cudaStreamSynchronize(raw(ambient())));
    return found;
  }

  std::unique_ptr<OneStream> own;
};
INSTANTIATE_TYPED_TEST_SUITE_P(Cuda, DispatcherContract, CudaFixture);

struct CudaBlend {
  static std::string skip() { return no_device(); }
  static void blend(HostBlend& host, DType dtype) {
    const auto h = copy_of(host.h.data(), host.h.size());
    std::vector<std::unique_ptr<DeviceMemory>> deltas;
    std::vector<std::uintptr_t> addresses;
    for (const auto& delta : host.deltas) {
      deltas.push_back(copy_of(delta.data(), delta.size()));
      addresses.push_back(reinterpret_cast<std::uintptr_t>(deltas.back()->address));
    }
    const auto alpha = copy_of(host.alpha.data(), host.alpha.size() * sizeof(float));
    const auto address = [](const auto& memory) {
      return reinterpret_cast<std::uintptr_t>(memory->address);
    };
    const OneStream own;
    cuda_blend({address(h), addresses, address(alpha), address(h), host.numel, dtype}, 0,
               reinterpret_cast<CudaBackend::Stream>(own.stream));
    must(cudaStreamSynchronize(own.stream));
    must(cudaMemcpy(host.out.data(), h->address, host.out.size(), cudaMemcpyDeviceToHost));
  }

 private:
  static std::unique_ptr<DeviceMemory> copy_of(const void* data, std::size_t num_bytes) {
    auto memory = std::make_unique<DeviceMemory>(num_bytes + 1);
    must(cudaMemcpy(memory->address, data, num_bytes, cudaMemcpyHostToDevice));
    return memory;
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Cuda, BlendContract, CudaBlend);

TEST(CudaDevice, AForkAndJoinCanBeCaptured) {
  if (!no_device().empty()) GTEST_SKIP() << no_device();
  CudaFixture f;
  auto dispatcher = f.make(2);
  const auto there = f.cell(*dispatcher);
  const auto back = f.cell(*dispatcher);
  // In the strictest mode: any call that is unsafe in a capture fails it.
  must(cudaStreamBeginCapture(raw(f.ambient()), cudaStreamCaptureModeGlobal));
  const auto streams = dispatcher->fork(f.ambient(), 2);
  f.copy(*dispatcher, streams[1], there, back);
  dispatcher->join(f.ambient(), streams);
  cudaGraph_t graph = nullptr;
  must(cudaStreamEndCapture(raw(f.ambient()), &graph));
  cudaGraphExec_t exec = nullptr;
  must(cudaGraphInstantiate(&exec, graph, 0));
  for (const unsigned char value : {std::uint8_t{5}, std::uint8_t{6}}) {
    f.fill(*dispatcher, f.ambient(), there, value);
    must(cudaGraphLaunch(exec, raw(f.ambient())));
    EXPECT_EQ(f.value(*dispatcher, back), value);
  }
  must(cudaGraphExecDestroy(exec));
  must(cudaGraphDestroy(graph));
}

TEST(CudaDevice, AStreamOutlivesItsBackend) {
  if (!no_device().empty()) GTEST_SKIP() << no_device();
  CudaBackend::Stream stream = 0;
  {
    CudaBackend backend(1, 0, 0);
    stream = backend.stream(0);
  }
  // As the caching allocator does when a block that was recorded on it is freed.
  EXPECT_EQ(cudaStreamQuery(raw(stream)), cudaSuccess);
  EXPECT_EQ(CudaBackend(1, 0, 0).stream(0), stream);
}

}  // namespace
}  // namespace esper
