#include "engine.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <sched.h>

#include <cstring>
#include <stdexcept>

namespace mmopt {
namespace {

namespace ffi = tvm::ffi;

constexpr int kCpu = 1, kDevice = 0, kPooled = 2;
constexpr int kShareAllCores = -3;

// Calls `function`. Errors come back through the C interface: this program has another C++ library than TVM's, across
// which exceptions cannot pass.
template <typename... Args>
ffi::Any call(const std::string& what, const ffi::Function& function, Args&&... args) {
  auto result = function.CallExpected<ffi::Any>(std::forward<Args>(args)...);
  if (result.is_err()) throw std::runtime_error(what + " failed: " + std::string(result.error().message()));
  return std::move(result).value();
}

ffi::Function global(const char* name) {
  auto found = ffi::Function::GetGlobal(name);
  if (!found) throw std::runtime_error(std::string("TVM's runtime has no function ") + name);
  return *found;
}

ffi::Function method(const ffi::Any& module, const std::string& name) {
  ffi::Any found = call(name, global("ffi.ModuleGetFunction"), module, ffi::String(name), false);
  auto function = found.try_cast<ffi::Function>();
  if (!function) throw std::runtime_error("the compiled library has no function " + name);
  return *function;
}

// Memory that somebody else owns, as a tensor.
struct Borrowed {
  void AllocData(DLTensor* tensor, void* data) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

DLDataType dtype_of(const std::string& name) {
  TVMFFIByteArray text{name.data(), name.size()};
  DLDataType dtype;
  if (TVMFFIDataTypeFromString(&text, &dtype) != 0) throw std::runtime_error("unknown dtype " + name);
  return dtype;
}

ffi::Tensor borrow(const std::string& dtype, const std::vector<int64_t>& shape, void* data) {
  DLDevice device{kDLCPU, kDevice};
  return ffi::Tensor::FromNDAlloc(Borrowed(), ffi::ShapeView(shape.data(), shape.size()), dtype_of(dtype), device, data);
}

Array copy_out(const ffi::Tensor& tensor, const TensorSpec& spec) {
  ffi::ShapeView shape = tensor.shape();
  Array array(spec.dtype, std::vector<int64_t>(shape.begin(), shape.end()));
  DLDataType dtype = tensor.dtype();
  if (static_cast<size_t>(dtype.bits * dtype.lanes + 7) / 8 != item_size(spec.dtype)) {
    throw std::runtime_error("the output " + spec.name + " does not have the dtype " + spec.dtype);
  }
  std::memcpy(array.memory.data(), tensor.data_ptr(), array.bytes());
  return array;
}

std::vector<std::string> allowed_cpus() {
  cpu_set_t cpus;
  std::vector<std::string> found;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) {
    for (int n = 0; n < CPU_SETSIZE; ++n) {
      if (CPU_ISSET(n, &cpus)) found.push_back(std::to_string(n));
    }
  }
  if (found.empty()) found.push_back("0");
  return found;
}

// TVM takes the length of the list as the largest number of threads there will be.
void configure_threads(int threads) {
  std::vector<std::string> cpus = allowed_cpus();
  if (threads <= 0) threads = static_cast<int>(cpus.size());
  ffi::Array<ffi::String> list;
  for (int n = 0; n < threads; ++n) list.push_back(ffi::String(cpus[static_cast<size_t>(n) % cpus.size()]));
  call("starting threads", global("runtime.config_threadpool"), kShareAllCores, threads, list);
}

}  // namespace

struct Engine::State {
  ffi::Any library, machine;
  std::map<std::string, Weight> weights;
  std::map<std::string, ffi::Array<ffi::Any>> params;
  std::vector<std::vector<int64_t>> tables;
  Memory workspace;

  // The last argument of a segment's function: the table of addresses, when it has one, and its weights.
  const ffi::Array<ffi::Any>& params_of(const Segment& segment) {
    auto found = params.find(segment.function);
    if (found != params.end()) return found->second;
    // Address of a clock, of which there is none, that of the workspace, and those of the weights.
    std::vector<int64_t> table{0, reinterpret_cast<int64_t>(workspace.data())};
    std::vector<ffi::Tensor> tensors;
    for (const std::string& name : segment.params) {
      auto weight = weights.find(name);
      if (weight == weights.end()) throw std::runtime_error("the artifact has no weight " + name);
      tensors.push_back(borrow(weight->second.dtype, weight->second.shape, weight->second.data));
      table.push_back(reinterpret_cast<int64_t>(weight->second.data));
    }
    tables.push_back(std::move(table));
    ffi::Array<ffi::Any> made;
    int64_t length = static_cast<int64_t>(tables.back().size());
    if (segment.table) made.push_back(borrow("int64", {length}, tables.back().data()));
    for (const ffi::Tensor& tensor : tensors) made.push_back(tensor);
    return params.emplace(segment.function, made).first->second;
  }
};

Engine::Engine(const std::string& folder, const Manifest& manifest, int threads) : state_(std::make_unique<State>()) {
  configure_threads(threads);
  int64_t room = 0;
  for (const auto& [name, entry] : manifest.entries) {
    for (const Segment& segment : entry.segments) room = std::max(room, segment.workspace);
  }
  state_->workspace = Memory(static_cast<size_t>(room));
  state_->weights = map_weights(folder, manifest);
  std::string library = folder + "/" + manifest.folder + "lib.so";
  state_->library = call("loading the library", global("ffi.ModuleLoadFromFile"), ffi::String(library));
  state_->machine = call("loading the program", method(state_->library, "vm_load_executable"));
  call("starting the virtual machine", method(state_->machine, "vm_initialization"), kCpu, kDevice, kPooled);
}

Engine::~Engine() = default;

Arrays Engine::run(const EntryPoint& entry, const Arrays& inputs) {
  std::map<std::string, ffi::Tensor> values;
  for (const auto& [name, array] : inputs) values.insert({name, borrow(array.dtype, array.shape, array.memory.data())});
  for (const Segment& segment : entry.segments) {
    if (segment.kind != "native") {
      throw std::runtime_error("a part of the model is left to " + segment.kind +
                               ", which this program does not have; mmopt inspect says which part and why");
    }
    std::vector<ffi::AnyView> arguments;
    for (const std::string& name : segment.inputs) arguments.push_back(values.at(name));
    if (segment.table || !segment.params.empty()) arguments.push_back(state_->params_of(segment));
    ffi::Function function = method(state_->machine, segment.function);
    ffi::Any result;
    if (TVMFFIFunctionCall(ffi::details::ObjectUnsafe::TVMFFIObjectPtrFromObjectRef(function),
                           reinterpret_cast<TVMFFIAny*>(arguments.data()), static_cast<int32_t>(arguments.size()),
                           reinterpret_cast<TVMFFIAny*>(&result)) != 0) {
      throw std::runtime_error(segment.function + " failed: " +
                               std::string(ffi::details::MoveFromSafeCallRaised().message()));
    }
    auto results = result.try_cast<ffi::Array<ffi::Any>>();
    if (!results || results->size() != segment.outputs.size()) {
      throw std::runtime_error(segment.function + " gave another number of results than the manifest says");
    }
    for (size_t n = 0; n < segment.outputs.size(); ++n) {
      auto tensor = (*results)[static_cast<int64_t>(n)].try_cast<ffi::Tensor>();
      if (!tensor) throw std::runtime_error(segment.outputs[n] + " is not a tensor");
      values.insert_or_assign(segment.outputs[n], *tensor);
    }
  }
  Arrays outputs;
  for (const TensorSpec& spec : entry.outputs) outputs[spec.name] = copy_out(values.at(spec.name), spec);
  return outputs;
}

}  // namespace mmopt
