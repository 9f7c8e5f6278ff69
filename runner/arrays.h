// Arrays as files: NumPy's .npy, and .npz, which is a zip of them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mmopt {

// Memory for an array. It starts at a multiple of 64 bytes, as compiled kernels want it.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

// A dense array in row-major order. `dtype` is a name as the manifest uses it: float32, int64, bool, bfloat16, ...
struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  Memory memory;

  Array() = default;
  Array(std::string dtype, std::vector<int64_t> shape);

  int64_t size() const;
  size_t bytes() const;
};

using Arrays = std::map<std::string, Array>;

// Bytes of one element. Throws std::runtime_error for a dtype that has no whole bytes.
size_t item_size(const std::string& dtype);

// Shape and dtype as a reader of messages wants them: float32[1,3,224,224].
std::string describe(const std::string& dtype, const std::vector<int64_t>& shape);

// Reads one .npy file. Throws std::runtime_error, as do all functions below, when the file is none.
Array read_npy(const std::string& path);

// Reads every array of an .npz file whose members are stored, as numpy.savez writes it.
Arrays read_npz(const std::string& path);

void write_npy(const std::string& path, const Array& array);

void write_npz(const std::string& path, const Arrays& arrays);

// The content of a file.
std::string read_file(const std::string& path);

}  // namespace mmopt
