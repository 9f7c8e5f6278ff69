// Calls kernels of a library on saved arrays, for tests under an emulator.
//
// kernel_driver LIBRARY FOLDER [TIMES]: FOLDER/cases.txt has a line for each case: function, inputs, sizes, outputs, and then the
// sizes themselves. Case N reads N.inK.npy, and N.outK.npy for what its results hold before, and writes N.outK.npy. Every
// function is called once, or as many times as told.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "arrays.h"

namespace {

namespace ffi = tvm::ffi;
using namespace mmopt;

constexpr size_t kAround = 256;
constexpr char kMark = '\xA5';

struct Borrowed {
  void AllocData(DLTensor* tensor, void* data) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

// An array between marked bytes.
struct Guarded {
  Array array;
  Memory memory;
  size_t bytes;

  explicit Guarded(const std::string& path) : array(read_npy(path)), bytes(array.bytes()) {
    memory = Memory(bytes + 2 * kAround);
    std::memset(memory.data(), kMark, bytes + 2 * kAround);
    std::memcpy(data(), array.memory.data(), bytes);
  }

  char* data() const { return memory.data() + kAround; }

  bool intact() const {
    for (size_t n = 0; n < kAround; ++n) {
      if (memory.data()[n] != kMark || data()[bytes + n] != kMark) return false;
    }
    return true;
  }

  bool unchanged() const { return std::memcmp(data(), array.memory.data(), bytes) == 0; }

  ffi::Tensor tensor() const {
    TVMFFIByteArray name{array.dtype.data(), array.dtype.size()};
    DLDataType dtype;
    TVMFFIDataTypeFromString(&name, &dtype);
    ffi::ShapeView shape(array.shape.data(), array.shape.size());
    return ffi::Tensor::FromNDAlloc(Borrowed(), shape, dtype, DLDevice{kDLCPU, 0}, static_cast<void*>(data()));
  }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

ffi::Any call(const ffi::Function& function, const std::vector<ffi::AnyView>& arguments) {
  ffi::Any result;
  auto* object = ffi::details::ObjectUnsafe::TVMFFIObjectPtrFromObjectRef(function);
  auto* views = reinterpret_cast<TVMFFIAny*>(const_cast<ffi::AnyView*>(arguments.data()));
  if (TVMFFIFunctionCall(object, views, static_cast<int>(arguments.size()), reinterpret_cast<TVMFFIAny*>(&result)) != 0) {
    fail(std::string(ffi::details::MoveFromSafeCallRaised().message()));
  }
  return result;
}

}  // namespace

int main(int count, char** words) {
  if (count < 3 || count > 4) fail("usage: kernel_driver LIBRARY FOLDER [TIMES]");
  int times = count == 4 ? std::atoi(words[3]) : 1;
  std::string folder = std::string(words[2]) + "/";
  ffi::Any module = call(*ffi::Function::GetGlobal("ffi.ModuleLoadFromFile"), {ffi::String(words[1])});
  std::ifstream cases(folder + "cases.txt");
  std::string line;
  for (int number = 0; std::getline(cases, line); ++number) {
    std::istringstream words_of(line);
    std::string name;
    size_t inputs, sizes, outputs;
    words_of >> name >> inputs >> sizes >> outputs;
    std::vector<Guarded> given, results;
    for (size_t n = 0; n < inputs; ++n) {
      given.emplace_back(folder + std::to_string(number) + ".in" + std::to_string(n) + ".npy");
    }
    for (size_t n = 0; n < outputs; ++n) {
      results.emplace_back(folder + std::to_string(number) + ".out" + std::to_string(n) + ".npy");
    }
    std::vector<ffi::Tensor> tensors;
    for (const auto& one : given) tensors.push_back(one.tensor());
    for (const auto& one : results) tensors.push_back(one.tensor());
    std::vector<ffi::AnyView> arguments(tensors.begin(), tensors.begin() + static_cast<std::ptrdiff_t>(inputs));
    for (size_t n = 0; n < sizes; ++n) {
      int64_t size;
      words_of >> size;
      arguments.push_back(size);
    }
    arguments.insert(arguments.end(), tensors.begin() + static_cast<std::ptrdiff_t>(inputs), tensors.end());
    ffi::Any function = call(*ffi::Function::GetGlobal("ffi.ModuleGetFunction"), {module, ffi::String(name), false});
    for (int n = 0; n < times; ++n) call(function.cast<ffi::Function>(), arguments);
    for (const auto& one : given) {
      if (!one.intact() || !one.unchanged()) fail(line + ": an input was written to");
    }
    for (size_t n = 0; n < outputs; ++n) {
      if (!results[n].intact()) fail(line + ": memory around a result was written to");
      std::memcpy(results[n].array.memory.data(), results[n].data(), results[n].bytes);
      write_npy(folder + std::to_string(number) + ".out" + std::to_string(n) + ".npy", results[n].array);
    }
  }
  return 0;
}
