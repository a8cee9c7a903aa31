#include "esper/cuda_backend.h"

#include <gtest/gtest.h>

namespace esper {
namespace {

// Holds in every build, on every machine. What needs a device is in cuda_device_test.cpp, and,
// where torch gives memory and streams, in tests/unit/native/test_cuda.py.
TEST(CudaBackend, SaysWhyItIsNotThere) {
  if (cuda_available()) {
    EXPECT_EQ(CudaBackend(3, 0, 0).num_streams(), 3U);
    EXPECT_THROW(CudaBackend(0, 0, 0), InvalidInput);
    EXPECT_THROW(CudaBackend(1, 9999, 0), InvalidInput);
    EXPECT_THROW(CudaBackend(1, 0, 9999), InvalidInput);
    return;
  }
  EXPECT_THROW(CudaBackend(1, 0, 0), DeviceError);
  EXPECT_THROW(CudaProbe(1, 0), DeviceError);
}

TEST(CudaBackend, IsAvailableOnlyWhereItIsBuilt) {
  EXPECT_TRUE(cuda_built() || !cuda_available());
}

}  // namespace
}  // namespace esper
