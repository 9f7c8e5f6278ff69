// What an artifact's folder holds: its manifest, and its weights where they lie in their file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mmopt {

// An input or output. Extents are numbers, or names of sizes known when it runs.
struct TensorSpec {
  std::string name, dtype, kind;
  bool ranked = true;
  std::vector<std::string> shape;
};

// A function of the library, and what it reads and makes.
struct Segment {
  std::string kind, function;
  std::vector<std::string> inputs, outputs, params;
  bool table = false;
  int64_t workspace = 0;
};

struct EntryPoint {
  std::vector<TensorSpec> inputs, outputs;
  std::vector<Segment> segments;
};

struct Target {
  std::string name, triple;
  std::vector<std::string> features;
};

struct Manifest {
  Target target;
  std::map<std::string, EntryPoint> entries;
  std::map<std::string, int64_t> file_sizes;
};

// A weight, inside the mapping of its file.
struct Weight {
  std::string dtype;
  std::vector<int64_t> shape;
  char* data;
};

// Reads manifest.json, and checks that every file this program uses is there in full.
// Throws std::runtime_error, as do the functions below.
Manifest read_manifest(const std::string& folder);

// Fails when the target is another architecture, or has features that this CPU lacks.
void check_cpu(const Target& target);

// Maps a safetensors file. The mapping stays until the process ends.
std::map<std::string, Weight> map_weights(const std::string& path);

}  // namespace mmopt
