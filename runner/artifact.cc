#include "artifact.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <cstring>
#include <set>
#include <sstream>
#include <stdexcept>

#include "arrays.h"

namespace mmopt {
namespace {

namespace json = tvm::ffi::json;
using tvm::ffi::Any;
using tvm::ffi::String;

constexpr int64_t kSchema = 1;
constexpr char kLibrary[] = "lib.so";
constexpr char kWeights[] = "weights.safetensors";
constexpr char kIntegers[] = "__integers__.";
constexpr char kScales[] = "__scales__.";
constexpr char kFacts[] = "__encoded__.";

json::Value parse(const std::string& text, const std::string& where) {
  String error;
  json::Value value = json::Parse(String(text), &error);
  if (!error.empty()) throw std::runtime_error(where + ": it is not JSON: " + std::string(error));
  return value;
}

template <typename T>
T get(const json::Value& value, const char* what) {
  auto found = value.try_cast<T>();
  if (!found) throw std::runtime_error(std::string("manifest.json is damaged: ") + what);
  return *found;
}

Any member(const json::Value& object, const char* key) {
  auto map = get<json::Object>(object, key);
  auto found = map.find(String(key));
  if (found == map.end()) throw std::runtime_error(std::string("manifest.json has no ") + key);
  return (*found).second;
}

std::string text(const json::Value& object, const char* key) {
  return std::string(get<String>(member(object, key), key));
}

std::string text_of(const Any& value) {
  if (auto number = value.try_cast<int64_t>()) return std::to_string(*number);
  return std::string(get<String>(value, "an extent"));
}

std::vector<std::string> texts(const json::Value& value, const char* what) {
  std::vector<std::string> found;
  for (const Any& item : get<json::Array>(value, what)) found.push_back(text_of(item));
  return found;
}

TensorSpec spec_of(const json::Value& value) {
  TensorSpec spec{text(value, "name"), text(value, "dtype"), text(value, "kind"), true, {}};
  Any shape = member(value, "shape");
  spec.ranked = shape != nullptr;
  if (spec.ranked) spec.shape = texts(shape, "shape");
  return spec;
}

Segment segment_of(const json::Value& value) {
  Segment segment;
  segment.kind = text(value, "kind");
  segment.function = text(value, "function");
  segment.inputs = texts(member(value, "inputs"), "inputs");
  segment.outputs = texts(member(value, "outputs"), "outputs");
  segment.params = texts(member(value, "params"), "params");
  segment.table = get<bool>(member(value, "table"), "table");
  segment.workspace = get<int64_t>(member(value, "workspace"), "workspace");
  return segment;
}

EntryPoint entry_of(const json::Value& value) {
  EntryPoint entry;
  for (const Any& item : get<json::Array>(member(value, "inputs"), "inputs")) entry.inputs.push_back(spec_of(item));
  for (const Any& item : get<json::Array>(member(value, "outputs"), "outputs")) entry.outputs.push_back(spec_of(item));
  for (const Any& item : get<json::Array>(member(value, "segments"), "segments")) {
    entry.segments.push_back(segment_of(item));
  }
  return entry;
}

int64_t size_of(const std::string& path) {
  struct stat found;
  return stat(path.c_str(), &found) == 0 ? static_cast<int64_t>(found.st_size) : -1;
}

// Features of this CPU by the names that Linux has for them.
std::set<std::string> running_features() {
  std::set<std::string> found;
#if defined(__aarch64__) && defined(__linux__)
  // From the kernel itself and not from /proc/cpuinfo, which emulators leave as the host's.
  static const char* const first[] = {"fp",      "asimd",    "evtstrm", "aes",     "pmull",   "sha1",   "sha2",    "crc32",
                                      "atomics", "fphp",     "asimdhp", "cpuid",   "asimdrdm", "jscvt", "fcma",    "lrcpc",
                                      "dcpop",   "sha3",     "sm3",     "sm4",     "asimddp", "sha512", "sve",     "asimdfhm",
                                      "dit",     "uscat",    "ilrcpc",  "flagm",   "ssbs",    "sb",     "paca",    "pacg"};
  static const char* const second[] = {"dcpodp",  "sve2",     "sveaes",  "svepmull", "svebitperm", "svesha3", "svesm4",
                                       "flagm2",  "frint",    "svei8mm", "svef32mm", "svef64mm",   "svebf16", "i8mm",
                                       "bf16"};
  unsigned long flags = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
  for (size_t n = 0; n < std::size(first); ++n) {
    if (flags >> n & 1) found.insert(first[n]);
  }
  for (size_t n = 0; n < std::size(second); ++n) {
    if (more >> n & 1) found.insert(second[n]);
  }
#else
  std::istringstream lines(read_file("/proc/cpuinfo"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) found.insert(word);
    break;
  }
#endif
  return found;
}

#if defined(__aarch64__)
constexpr char kMachine[] = "aarch64";
#else
constexpr char kMachine[] = "x86_64";
#endif

std::vector<int64_t> numbers(const json::Value& value, const char* what) {
  std::vector<int64_t> found;
  for (const Any& item : get<json::Array>(value, what)) found.push_back(get<int64_t>(item, what));
  return found;
}

// A float32 weight that is stored in integers of 8 or 4 bits: the integers times scales, which neighbours share.
Weight decode(const Weight& integers, const Weight& scales, const json::Value& facts) {
  std::vector<int64_t> shape = numbers(member(facts, "shape"), "shape");
  std::vector<int64_t> repeats = numbers(member(facts, "repeats"), "repeats");
  bool pairs = get<int64_t>(member(facts, "bits"), "bits") == 4;  // two to a byte, the first in the lower half
  static std::vector<Memory> kept;  // like mappings, until the process ends
  int64_t size = 1, packed = 1;
  for (int64_t extent : shape) size *= extent;
  for (int64_t extent : integers.shape) packed *= extent;
  bool fits = shape.size() == repeats.size() && shape.size() == scales.shape.size();
  fits = fits && packed == (pairs ? (size + 1) / 2 : size);
  for (size_t n = 0; fits && n < shape.size(); ++n) fits = scales.shape[n] * repeats[n] == shape[n];
  if (!fits) throw std::runtime_error("the weight file is damaged: scales do not fit integers");
  kept.emplace_back(static_cast<size_t>(size) * sizeof(float));
  float* made = reinterpret_cast<float*>(kept.back().data());
  const float* factors = reinterpret_cast<const float*>(scales.data);
  const auto* bytes = reinterpret_cast<const int8_t*>(integers.data);
  std::vector<int64_t> at(shape.size(), 0);
  for (int64_t n = 0; n < size; ++n) {
    int64_t place = 0;
    for (size_t axis = 0; axis < shape.size(); ++axis) place = place * scales.shape[axis] + at[axis] / repeats[axis];
    int value = bytes[pairs ? n / 2 : n];
    if (pairs) value = (((n % 2 ? value >> 4 : value) & 15) ^ 8) - 8;
    made[n] = static_cast<float>(value) * factors[place];
    for (size_t axis = shape.size(); axis-- > 0 && ++at[axis] == shape[axis];) at[axis] = 0;
  }
  return {"float32", shape, kept.back().data()};
}

// The weights in a safetensors file.
std::map<std::string, Weight> map_file(const std::string& path) {
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  int64_t size = size_of(path);
  if (file < 0 || size < 8) throw std::runtime_error(path + ": it cannot be read");
  void* mapped = mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error(path + ": it cannot be mapped");
  char* data = static_cast<char*>(mapped);
  uint64_t length;
  std::memcpy(&length, data, sizeof length);
  if (length > static_cast<uint64_t>(size) - 8) throw std::runtime_error(path + ": its header is cut off");
  json::Value header = parse(std::string(data + 8, length), path);
  static const std::map<std::string, std::string> names = {
      {"BOOL", "bool"},    {"U8", "uint8"},    {"I8", "int8"},     {"U16", "uint16"},  {"I16", "int16"},
      {"F16", "float16"},  {"BF16", "bfloat16"}, {"U32", "uint32"}, {"I32", "int32"},   {"F32", "float32"},
      {"U64", "uint64"},   {"I64", "int64"},   {"F64", "float64"}, {"F8_E4M3", "float8_e4m3fn"}, {"F8_E5M2", "float8_e5m2"}};
  std::map<std::string, Weight> weights;
  json::Object all = get<json::Object>(header, "the header of the weights");
  // Types that the format does not have are bytes in it; what they are stands in its metadata.
  json::Object others;
  if (all.count(String("__metadata__"))) others = get<json::Object>(member(header, "__metadata__"), "__metadata__");
  for (const auto& [key, entry] : all) {
    std::string name = text_of(key);
    if (name == "__metadata__" || name.rfind("__padding__.", 0) == 0) continue;
    auto dtype = names.find(text(entry, "dtype"));
    std::vector<std::string> place = texts(member(entry, "data_offsets"), "data_offsets");
    int64_t end = static_cast<int64_t>(8 + length) + std::stoll(place.at(1));
    if (dtype == names.end() || end > size) throw std::runtime_error(path + ": it is damaged at " + name);
    Weight weight{dtype->second, {}, data + 8 + length + std::stoll(place.at(0))};
    json::Value described = entry;
    if (others.count(key)) {
      described = parse(text_of(others[key]), path);
      weight.dtype = text(described, "dtype");
    }
    for (const std::string& extent : texts(member(described, "shape"), "shape")) {
      weight.shape.push_back(std::stoll(extent));
    }
    weights[name] = weight;
  }
  for (const auto& [key, facts] : others) {
    std::string name = text_of(key);
    if (name.rfind(kFacts, 0) != 0) continue;
    name.erase(0, std::strlen(kFacts));
    weights[name] = decode(weights.at(kIntegers + name), weights.at(kScales + name), parse(text_of(facts), path));
    weights.erase(kIntegers + name);
    weights.erase(kScales + name);
  }
  return weights;
}

// Why this CPU cannot run code for `target`, or "".
std::string refusal(const Target& target) {
  std::string wanted = target.triple.substr(0, target.triple.find('-'));
  if (wanted == "arm64") wanted = "aarch64";
  if (wanted != kMachine) {
    return "the artifact is compiled for " + target.name + " (" + wanted + "), this machine is " + kMachine;
  }
  std::set<std::string> available = running_features();
  std::string missing;
  for (const std::string& feature : target.features) {
    if (!available.count(feature)) missing += (missing.empty() ? "" : ", ") + feature;
  }
  if (missing.empty()) return "";
  return "the artifact is compiled for " + target.name + ", which has " + missing +
         "; this CPU does not. Compile it again with --target for this machine";
}

// The first of what an artifact is compiled for that this CPU can run.
Manifest first_that_runs(const std::vector<json::Value>& choices) {
  std::string why;
  for (const json::Value& choice : choices) {
    json::Value target = member(choice, "target");
    Manifest manifest;
    manifest.target = {text(target, "name"), text(target, "triple"), texts(member(target, "features"), "features")};
    why = refusal(manifest.target);
    if (!why.empty()) continue;
    if (get<json::Object>(choice, "manifest").count(String("folder"))) manifest.folder = text(choice, "folder");
    for (const auto& [name, entry] : get<json::Object>(member(choice, "entries"), "entries")) {
      manifest.entries[text_of(name)] = entry_of(entry);
    }
    return manifest;
  }
  throw std::runtime_error(why);
}

// Files that are read. Of the weights, those of a further target hold what it packs differently.
std::vector<std::string> used_files(const Manifest& manifest) {
  std::vector<std::string> names{manifest.folder + kLibrary, kWeights}, found;
  if (!manifest.folder.empty()) names.push_back(manifest.folder + kWeights);
  for (const std::string& name : names) {
    if (manifest.file_sizes.count(name)) found.push_back(name);
  }
  return found;
}

}  // namespace

Manifest read_manifest(const std::string& folder) {
  std::string path = folder + "/manifest.json";
  json::Value document = parse(read_file(path), path);
  if (text(document, "format") != "mmopt-artifact") throw std::runtime_error(path + ": it is not an mmopt artifact's");
  int64_t schema = get<int64_t>(member(document, "schema_version"), "schema_version");
  if (schema != kSchema) {
    throw std::runtime_error(path + ": it has schema version " + std::to_string(schema) + ", this program reads " +
                             std::to_string(kSchema));
  }
  std::vector<json::Value> choices{document};
  if (get<json::Object>(document, "manifest").count(String("variants"))) {
    for (const Any& variant : get<json::Array>(member(document, "variants"), "variants")) choices.push_back(variant);
  }
  Manifest manifest = first_that_runs(choices);
  for (const auto& [name, record] : get<json::Object>(member(document, "files"), "files")) {
    manifest.file_sizes[text_of(name)] = get<int64_t>(member(record, "size"), "size");
  }
  for (const std::string& name : used_files(manifest)) {
    if (size_of(folder + "/" + name) != manifest.file_sizes.at(name)) {
      throw std::runtime_error(folder + "/" + name + ": it is not complete; copy the artifact again");
    }
  }
  return manifest;
}

std::map<std::string, Weight> map_weights(const std::string& folder, const Manifest& manifest) {
  std::map<std::string, Weight> weights;
  for (const std::string& name : used_files(manifest)) {
    if (name.find(kWeights) == std::string::npos) continue;
    for (auto& [key, weight] : map_file(folder + "/" + name)) weights.insert_or_assign(key, weight);
  }
  return weights;
}

}  // namespace mmopt
