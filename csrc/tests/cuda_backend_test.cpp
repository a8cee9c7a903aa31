#include "esper/cuda_backend.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <string>

#include "esper/blend.h"
#include "esper/errors.h"

namespace esper {
namespace {

// Holds in every build, on every machine. What needs a device is in cuda_device_test.cpp, and,
// where torch gives memory and streams, in tests/unit/native/test_cuda.py.

// What the driver itself says, without the CUDA runtime: 0 where there is no driver.
int devices_by_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto get_count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int count = 0;
  if (init == nullptr || get_count == nullptr || init(0) != 0 || get_count(&count) != 0) return 0;
  return count;  // the driver stays loaded: its threads do not survive an unloading
}

void make_backend(int device) {
  const CudaBackend backend(3, device, 0);
  EXPECT_EQ(backend.num_streams(), 3U);
}

void make_probe(int device) {
  EXPECT_EQ(CudaProbe(1, device).refused(), 0U);
}

void blend_nothing(int device) {
  cuda_blend({0, {}, 0, 0, 0, DType::FLOAT32}, device, 0);
}

struct WayIn {
  const char* name;
  void (*call)(int device);
};
constexpr WayIn kWaysIn[] = {
    {"CudaBackend", make_backend}, {"CudaProbe", make_probe}, {"cuda_blend", blend_nothing}};

template <class Error>
std::string message_of(const WayIn& way, int device) {
  try {
    way.call(device);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(CudaBackend, IsNotAvailableWithoutTheBuildOrADevice) {
  // Not the other way round: a driver may be too old for the runtime of the build.
  if (cuda_built() && devices_by_driver() > 0) GTEST_SKIP() << "the driver sees a CUDA device";
  EXPECT_FALSE(cuda_available());
}

TEST(CudaBackend, WithoutADeviceEveryWayInSaysWhy) {
  if (cuda_available()) GTEST_SKIP() << "a CUDA device is there";
  const std::string expected =
      cuda_built() ? "failed with cudaError" : "got a build without a CUDA compiler";
  for (const WayIn& way : kWaysIn) {
    const std::string message = message_of<DeviceError>(way, 0);
    EXPECT_NE(message.find(expected), std::string::npos) << way.name << ": " << message;
  }
}

TEST(CudaBackend, WithADeviceEveryWayInTakesItAndNoOther) {
  if (!cuda_available()) GTEST_SKIP() << "needs a CUDA device";
  for (const WayIn& way : kWaysIn) {
    EXPECT_NO_THROW(way.call(0)) << way.name;
    for (const int device : {-1, devices_by_driver(), 9999}) {
      const std::string message = message_of<InvalidInput>(way, device);
      EXPECT_EQ(message.rfind("device must be below the number of CUDA devices", 0), 0U)
          << way.name << ": " << message;
    }
  }
  EXPECT_THROW(CudaBackend(0, 0, 0), InvalidInput);
  EXPECT_THROW(CudaBackend(1, 0, 9999), InvalidInput);
}

}  // namespace
}  // namespace esper
