#include "arrays.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <sstream>
#include <stdexcept>

namespace mmopt {
namespace {

constexpr size_t kAlignment = 64;
constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicSize = 6;

struct Format {
  const char* npy;  // NumPy's name, without the sign of the byte order
  const char* name;
  size_t bytes;
};

// NumPy itself has no bfloat16 and no float8: ml_dtypes stores them as raw bytes.
constexpr Format kFormats[] = {
    {"b1", "bool", 1},      {"i1", "int8", 1},     {"u1", "uint8", 1},    {"i2", "int16", 2},
    {"u2", "uint16", 2},    {"i4", "int32", 4},    {"u4", "uint32", 4},   {"i8", "int64", 8},
    {"u8", "uint64", 8},    {"f2", "float16", 2},  {"f4", "float32", 4},  {"f8", "float64", 8},
    {"V2", "bfloat16", 2},  {"V1", "float8_e4m3fn", 1},
};

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw std::runtime_error(where + ": " + what);
}

const Format& format_of(const std::string& dtype) {
  for (const Format& format : kFormats) {
    if (dtype == format.name) return format;
  }
  throw std::runtime_error("arrays of " + dtype + " can be neither read nor written");
}

// The text behind 'key': in the dictionary of a header, up to `end`.
std::string field(const std::string& header, const std::string& key, char end, const std::string& where) {
  size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) fail(where, "its header has no " + key);
  at += key.size() + 3;
  size_t stop = header.find(end, at);
  if (stop == std::string::npos) fail(where, "its header is cut off");
  return header.substr(at, stop - at);
}

Array parse_header(const std::string& header, const std::string& where) {
  std::string descr = field(header, "descr", ',', where);
  size_t open = descr.find('\''), close = descr.rfind('\'');
  if (open == close) fail(where, "it holds records, not numbers");
  descr = descr.substr(open + 1, close - open - 1);
  if (descr.empty() || descr[0] == '>') fail(where, "its numbers are big-endian");
  if (descr[0] == '<' || descr[0] == '|' || descr[0] == '=') descr.erase(0, 1);
  if (field(header, "fortran_order", ',', where).find("True") != std::string::npos) {
    fail(where, "its axes are in Fortran order; save numpy.ascontiguousarray(x)");
  }
  auto* format = std::find_if(std::begin(kFormats), std::end(kFormats), [&](const Format& f) { return descr == f.npy; });
  if (format == std::end(kFormats)) fail(where, "it holds elements of type '" + descr + "'");
  std::vector<int64_t> shape;
  std::stringstream extents(field(header, "shape", ')', where));
  extents.ignore(16, '(');
  for (std::string extent; std::getline(extents, extent, ',');) {
    if (extent.find_first_of("0123456789") != std::string::npos) shape.push_back(std::stoll(extent));
  }
  return Array(format->name, shape);
}

Array parse_npy(const char* data, size_t size, const std::string& where) {
  if (size < kMagicSize + 6 || std::memcmp(data, kMagic, kMagicSize) != 0) fail(where, "it is not a .npy file");
  auto byte = [&](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(data[at])); };
  bool long_header = data[kMagicSize] > 1;
  size_t start = kMagicSize + (long_header ? 6 : 4);
  size_t length = byte(8) | byte(9) << 8;
  if (long_header) length |= byte(10) << 16 | byte(11) << 24;
  if (size < start + length) fail(where, "its header is cut off");
  Array array = parse_header(std::string(data + start, length), where);
  if (size - start - length < array.bytes()) fail(where, "it is cut off");
  std::memcpy(array.memory.data(), data + start + length, array.bytes());
  return array;
}

std::string npy_header(const Array& array) {
  const Format& format = format_of(array.dtype);
  std::string text = "{'descr': '" + std::string(format.bytes > 1 ? "<" : "|") + format.npy +
                     "', 'fortran_order': False, 'shape': (";
  for (int64_t extent : array.shape) text += std::to_string(extent) + ",";
  text += "), }";
  size_t start = kMagicSize + 4;
  text.append((kAlignment - (start + text.size() + 1) % kAlignment) % kAlignment, ' ');
  text += '\n';
  std::string header(kMagic, kMagicSize);
  header += {1, 0, static_cast<char>(text.size() & 0xFF), static_cast<char>(text.size() >> 8)};
  return header + text;
}

// A little-endian number inside a zip.
uint64_t number(const std::string& data, size_t at, size_t bytes, const std::string& where) {
  if (at + bytes > data.size()) fail(where, "it is cut off");
  uint64_t value = 0;
  for (size_t n = bytes; n-- > 0;) value = value << 8 | static_cast<unsigned char>(data[at + n]);
  return value;
}

void put(std::string& data, uint64_t value, size_t bytes) {
  for (size_t n = 0; n < bytes; ++n) data += static_cast<char>(value >> (8 * n) & 0xFF);
}

uint32_t crc32(const char* data, size_t size, uint32_t crc = 0) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> made(256);
    for (uint32_t n = 0; n < 256; ++n) {
      uint32_t value = n;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
      made[n] = value;
    }
    return made;
  }();
  crc = ~crc;
  for (size_t n = 0; n < size; ++n) crc = table[(crc ^ static_cast<unsigned char>(data[n])) & 0xFF] ^ crc >> 8;
  return ~crc;
}

// Sizes and the offset of a member, which zips of more than 4 GiB keep elsewhere: numpy does so for every member.
struct Member {
  std::string name;
  uint64_t method, stored, size, offset;
};

Member central_record(const std::string& data, size_t at, const std::string& where) {
  Member found;
  found.method = number(data, at + 10, 2, where);
  found.stored = number(data, at + 20, 4, where);
  found.size = number(data, at + 24, 4, where);
  found.offset = number(data, at + 42, 4, where);
  size_t name = number(data, at + 28, 2, where), extra = number(data, at + 30, 2, where);
  found.name = data.substr(at + 46, name);
  size_t field = at + 46 + name, end = field + extra;
  while (field + 4 <= end) {
    size_t length = number(data, field + 2, 2, where);
    if (number(data, field, 2, where) == 1) {
      size_t value = field + 4;
      for (uint64_t* wide : {&found.size, &found.stored, &found.offset}) {
        if (*wide != 0xFFFFFFFFu) continue;
        *wide = number(data, value, 8, where);
        value += 8;
      }
    }
    field += 4 + length;
  }
  return found;
}

std::ofstream create(const std::string& path) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  if (!file) fail(path, "it cannot be written");
  return file;
}

}  // namespace

Memory::Memory(size_t bytes) {
  size_t room = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  data_ = static_cast<char*>(std::aligned_alloc(kAlignment, room));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::Memory(Memory&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

Memory::~Memory() { std::free(data_); }

Array::Array(std::string dtype, std::vector<int64_t> shape) : dtype(std::move(dtype)), shape(std::move(shape)) {
  memory = Memory(bytes());
}

int64_t Array::size() const {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

size_t Array::bytes() const { return static_cast<size_t>(size()) * item_size(dtype); }

size_t item_size(const std::string& dtype) { return format_of(dtype).bytes; }

std::string describe(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string text = dtype + "[";
  for (size_t n = 0; n < shape.size(); ++n) text += (n ? "," : "") + std::to_string(shape[n]);
  return text + "]";
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "it cannot be read");
  std::stringstream content;
  content << file.rdbuf();
  return std::move(content).str();
}

Array read_npy(const std::string& path) {
  std::string data = read_file(path);
  return parse_npy(data.data(), data.size(), path);
}

Arrays read_npz(const std::string& path) {
  std::string data = read_file(path);
  size_t end = data.rfind(std::string("PK\x05\x06", 4));
  if (end == std::string::npos) fail(path, "it is not an .npz file");
  size_t count = number(data, end + 10, 2, path), at = number(data, end + 16, 4, path);
  Arrays arrays;
  for (size_t n = 0; n < count; ++n) {
    Member member = central_record(data, at, path);
    at += 46 + number(data, at + 28, 2, path) + number(data, at + 30, 2, path) + number(data, at + 32, 2, path);
    std::string where = path + ", " + member.name;
    if (member.method != 0) fail(where, "it is compressed; write it with numpy.savez");
    size_t names = number(data, member.offset + 26, 2, where) + number(data, member.offset + 28, 2, where);
    size_t start = member.offset + 30 + names;
    if (start + member.size > data.size()) fail(where, "it is cut off");
    size_t stem = member.name.rfind(".npy");
    arrays[member.name.substr(0, stem)] = parse_npy(data.data() + start, member.size, where);
  }
  return arrays;
}

void write_npy(const std::string& path, const Array& array) {
  std::ofstream file = create(path);
  file << npy_header(array);
  file.write(array.memory.data(), static_cast<std::streamsize>(array.bytes()));
  if (!file) fail(path, "it cannot be written");
}

void write_npz(const std::string& path, const Arrays& arrays) {
  std::ofstream file = create(path);
  std::string directory;
  uint64_t offset = 0;
  for (const auto& [name, array] : arrays) {
    std::string header = npy_header(array), member = name + ".npy", common;
    uint64_t size = header.size() + array.bytes();
    if (offset + size >= 0xFFFFFFFFu) fail(path, "its arrays have more than 4 GiB; write a folder of .npy files");
    uint32_t crc = crc32(array.memory.data(), array.bytes(), crc32(header.data(), header.size()));
    for (uint64_t value : {20, 0, 0, 0, 0x21}) put(common, value, 2);  // version, flags, stored, 1980-01-01
    put(common, crc, 4);
    put(common, size, 4);
    put(common, size, 4);
    put(common, member.size(), 2);
    put(common, 0, 2);
    file << "PK\x03\x04" << common << member << header;
    file.write(array.memory.data(), static_cast<std::streamsize>(array.bytes()));
    directory += "PK\x01\x02";
    put(directory, 20, 2);
    directory += common;
    put(directory, 0, 10);  // no comment, first disk, attributes
    put(directory, offset, 4);
    directory += member;
    offset += 4 + common.size() + member.size() + size;
  }
  std::string end = "PK\x05\x06";
  put(end, 0, 4);
  put(end, arrays.size(), 2);
  put(end, arrays.size(), 2);
  put(end, directory.size(), 4);
  put(end, offset, 4);
  put(end, 0, 2);
  file << directory << end;
  if (!file) fail(path, "it cannot be written");
}

}  // namespace mmopt
