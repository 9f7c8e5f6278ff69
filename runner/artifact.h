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

// What an artifact has for one target. `folder` is where its library is, in the artifact: "", or a path ending in /.
struct Manifest {
  Target target;
  std::string folder;
  std::map<std::string, EntryPoint> entries;
  std::map<std::string, int64_t> file_sizes;
};

// A weight, inside the mapping of its file, which stays until the process ends.
struct Weight {
  std::string dtype;
  std::vector<int64_t> shape;
  char* data;
};

// Reads manifest.json, gives what it has for the first of its targets that this CPU can run, and checks that all files
// needed for that are there in full. Fails when there is no such target: another architecture, or features it lacks.
// Throws std::runtime_error, as do the functions below.
Manifest read_manifest(const std::string& folder);

// The weights of an artifact's manifest.
std::map<std::string, Weight> map_weights(const std::string& folder, const Manifest& manifest);

}  // namespace mmopt
