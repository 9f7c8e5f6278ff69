// Runs entry points of an artifact in TVM's virtual machine.
#pragma once

#include <memory>
#include <string>

#include "arrays.h"
#include "artifact.h"

namespace mmopt {

class Engine {
 public:
  // Loads the library and the weights of the artifact in `folder`. `threads` of 0 is one for each CPU it may use.
  // Throws std::runtime_error, as does `run`.
  Engine(const std::string& folder, const Manifest& manifest, int threads);
  ~Engine();

  // Computes all outputs of an entry point. Inputs must be those it names, with dtypes and shapes as specified.
  Arrays run(const EntryPoint& entry, const Arrays& inputs);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mmopt
