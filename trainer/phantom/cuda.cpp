// A CUDA device without hardware, for torch's CPU build. Autograd asks for a device guard as soon as a tensor is on
// "cuda", ATen for the hooks of CUDA, and attention for a choice of its kernel: each is answered here. Nothing computes.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SDPBackend.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

constexpr c10::DeviceIndex DEVICES = 8;
constexpr int64_t WIDEST_FLASH_HEAD = 256;

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const auto before = current;
  current = index < 0 ? before : index;
  return before;
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device to) const override {
    return c10::Device(c10::DeviceType::CUDA, exchange(to.index()));
  }
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, current); }
  void setDevice(c10::Device to) const override { exchange(to.index()); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { exchange(to.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }

  // One stream per device, whose work is always done.
  c10::Stream getStream(c10::Device of) const override { return c10::Stream(c10::Stream::DEFAULT, of); }
  c10::Stream getNewStream(c10::Device of, int) const override { return getStream(of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return getStream(of); }
  c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream to) const override { return to; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  int getNumGPUs() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex to) const override { exchange(to); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override { return exchange(to); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return exchange(to); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(0); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(0);
    return generator;
  }
};

// The kernel that torch takes on an A100 and later: FlashAttention without a mask tensor for heads that it supports,
// else the memory-efficient one, which supports all others.
int64_t attention_kernel(
    const at::Tensor& query,
    const at::Tensor&,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    double,
    bool,
    std::optional<double>,
    bool) {
  const auto type = query.scalar_type();
  const bool half = type == at::kBFloat16 || type == at::kHalf;
  const bool narrow = query.size(-1) <= WIDEST_FLASH_HEAD && value.size(-1) == query.size(-1);
  const bool flash = half && narrow && !(mask.has_value() && mask->defined());
  return static_cast<int64_t>(flash ? at::SDPBackend::flash_attention : at::SDPBackend::efficient_attention);
}

const bool registered = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_kernel);
  return true;
}();

// A CUDA build has one kernel for it. Without one here, torch would compute it by operators, whose results take memory.
at::Tensor silu_backward(const at::Tensor&, const at::Tensor& input) {
  return at::empty_like(input);
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("silu_backward", silu_backward);
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at
