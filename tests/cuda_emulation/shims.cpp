// What a CUDA build of torch would answer to a CUDA op's binding, and a record of what it was asked. Linked with
// -Bsymbolic into an op's library, it lets the binding run on a CPU torch, on CPU tensors, over the emulated kernel.
#include <cstdint>

namespace {
int32_t guarded_device = -100;
int32_t stream_device = -100;
int guards_open = 0;
int guards_opened = 0;
int stream_tag = 0;
}  // namespace

extern "C" {

struct DeviceGuardOpaque;

__attribute__((visibility("default"))) int32_t aoti_torch_create_device_guard(int32_t device, DeviceGuardOpaque** out) {
  guarded_device = device;
  ++guards_open;
  ++guards_opened;
  *out = reinterpret_cast<DeviceGuardOpaque*>(&guards_open);
  return 0;
}

__attribute__((visibility("default"))) int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque*) {
  --guards_open;
  return 0;
}

// A stream is only to be had while the guard is open: a binding that asks before would take another device's.
__attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** out) {
  stream_device = guards_open == 1 ? device : -200;
  *out = &stream_tag;
  return 0;
}

// guards opened, guards left open, the guard's device, the stream's device
__attribute__((visibility("default"))) void emulated_record(int32_t* out) {
  out[0] = guards_opened;
  out[1] = guards_open;
  out[2] = guarded_device;
  out[3] = stream_device;
}
}
