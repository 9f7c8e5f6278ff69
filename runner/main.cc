// mmopt-run: runs a compiled artifact where there is no Python.

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#include "arrays.h"
#include "artifact.h"
#include "engine.h"

namespace {

using namespace mmopt;

constexpr char kUsage[] =
    "usage: mmopt-run ARTIFACT [--inputs X.npz] [--input NAME=X.npy]... [-o Y.npz | -o FOLDER/]\n"
    "                 [--entry NAME] [--threads N] [--repeat N]\n"
    "\n"
    "Runs an entry point of an artifact's folder, main unless named, on arrays saved by NumPy.\n"
    "Outputs go to one .npz file, or as .npy files into a folder whose name ends with /.\n"
    "--repeat runs it so many times more, and tells how long that took.\n";

struct Options {
  std::string artifact, output, entry = "main";
  Arrays inputs;
  int threads = 0, repeat = 0;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int number(const std::string& text, const std::string& option) {
  char* end = nullptr;
  long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0 || value > 1000000) throw UsageError(option + " wants a number, not " + text);
  return static_cast<int>(value);
}

Options parse(int count, char** words) {
  Options options;
  auto argument = [&](int& at) -> std::string {
    if (at + 1 >= count) throw UsageError(std::string(words[at]) + " wants a value");
    return words[++at];
  };
  for (int at = 1; at < count; ++at) {
    std::string word = words[at];
    if (word == "--inputs") {
      for (auto& [name, array] : read_npz(argument(at))) options.inputs[name] = std::move(array);
    } else if (word == "--input") {
      std::string pair = argument(at);
      size_t sign = pair.find('=');
      if (sign == std::string::npos) throw UsageError("--input wants NAME=FILE.npy, not " + pair);
      options.inputs[pair.substr(0, sign)] = read_npy(pair.substr(sign + 1));
    } else if (word == "-o" || word == "--output") {
      options.output = argument(at);
    } else if (word == "--entry") {
      options.entry = argument(at);
    } else if (word == "--threads") {
      options.threads = number(argument(at), word);
    } else if (word == "--repeat") {
      options.repeat = number(argument(at), word);
    } else if (word[0] == '-' || !options.artifact.empty()) {
      throw UsageError("unknown option " + word);
    } else {
      options.artifact = word;
    }
  }
  if (options.artifact.empty()) throw UsageError("which artifact?");
  return options;
}

const EntryPoint& find_entry(const Manifest& manifest, const std::string& name) {
  auto found = manifest.entries.find(name);
  if (found != manifest.entries.end()) return found->second;
  std::string known;
  for (const auto& [other, entry] : manifest.entries) known += " " + other;
  throw UsageError("there is no entry point " + name + "; there are:" + known);
}

// Inputs must be exactly those of the entry point; a named extent is the same size wherever it stands.
void check_inputs(const EntryPoint& entry, const Arrays& inputs) {
  std::map<std::string, int64_t> sizes;
  for (const TensorSpec& spec : entry.inputs) {
    if (spec.kind != "tensor") throw UsageError("the input " + spec.name + " is a " + spec.kind + ", not a tensor");
    auto found = inputs.find(spec.name);
    if (found == inputs.end()) throw UsageError("the input " + spec.name + " is missing");
    const Array& array = found->second;
    std::string wanted;
    for (const std::string& extent : spec.shape) wanted += (wanted.empty() ? "" : ",") + extent;
    bool fits = array.dtype == spec.dtype && (!spec.ranked || array.shape.size() == spec.shape.size());
    for (size_t n = 0; fits && n < spec.shape.size(); ++n) {
      const std::string& extent = spec.shape[n];
      bool fixed = extent.find_first_not_of("0123456789") == std::string::npos;
      int64_t size = fixed ? std::stoll(extent) : sizes.insert({extent, array.shape[n]}).first->second;
      fits = size == array.shape[n];
    }
    if (!fits) {
      throw UsageError("the input " + spec.name + " is " + describe(array.dtype, array.shape) + ", not " + spec.dtype +
                       "[" + wanted + "]");
    }
  }
  for (const auto& given : inputs) {
    auto named = [&](const TensorSpec& spec) { return spec.name == given.first; };
    if (std::none_of(entry.inputs.begin(), entry.inputs.end(), named)) {
      throw UsageError("there is no input " + given.first);
    }
  }
}

void write_outputs(const std::string& path, const Arrays& outputs) {
  if (path.empty()) return;
  if (path.back() != '/') return write_npz(path, outputs);
  mkdir(path.c_str(), 0777);
  for (const auto& [name, array] : outputs) {
    std::string file = name;
    std::replace(file.begin(), file.end(), '/', '_');
    write_npy(path + file + ".npy", array);
  }
}

void measure(Engine& engine, const EntryPoint& entry, const Options& options) {
  std::vector<double> taken;
  for (int n = 0; n < options.repeat; ++n) {
    auto start = std::chrono::steady_clock::now();
    engine.run(entry, options.inputs);
    std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    taken.push_back(spent.count());
  }
  std::sort(taken.begin(), taken.end());
  std::printf("%d runs: median %.3f ms, fastest %.3f ms\n", options.repeat, taken[taken.size() / 2], taken[0]);
}

int run(int count, char** words) {
  Options options = parse(count, words);
  Manifest manifest = read_manifest(options.artifact);
  const EntryPoint& entry = find_entry(manifest, options.entry);
  check_inputs(entry, options.inputs);
  Engine engine(options.artifact, manifest, options.threads);
  Arrays outputs = engine.run(entry, options.inputs);
  for (const TensorSpec& spec : entry.outputs) {
    const Array& array = outputs.at(spec.name);
    std::printf("%s: %s\n", spec.name.c_str(), describe(array.dtype, array.shape).c_str());
  }
  write_outputs(options.output, outputs);
  if (options.repeat > 0) measure(engine, entry, options);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2 || std::string(words[1]) == "--help") {
    std::fputs(kUsage, count < 2 ? stderr : stdout);
    return count < 2 ? 2 : 0;
  }
  // Threads of TVM's pool look for work a millisecond before they sleep, and not for 60.
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "1000", 0);
  try {
    return run(count, words);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 4;
  }
}
