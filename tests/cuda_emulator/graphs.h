// The part of NVIDIA's runtime that records launches and repeats them. What edges leave open is done in another order
// every time, so that an edge that is missing shows as a wrong answer.

#pragma once
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "emulator.h"

extern "C" void* TVMFFIEnvGetStream(int32_t kind, int32_t device);

namespace emulator {

struct Node {
  std::function<void()> work;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<std::pair<Node*, Node*>> edges;
};

inline Graph* recording = nullptr;
inline void* recorded_stream = nullptr;
inline Node* last = nullptr;
inline std::mt19937 random_source{1};
inline long launched = 0;  // graphs

template <typename Body>
void submit(Index blocks, int threads, bool cooperative, Body body) {
  if (!recording) return launch(blocks, threads, cooperative, body);
  if (TVMFFIEnvGetStream(1, 0) != recorded_stream) {
    std::fprintf(stderr, "emulator: a launch on another stream than the one that is recorded\n");
    std::abort();
  }
  auto work = [=] { launch(blocks, threads, cooperative, body); };
  recording->nodes.push_back(std::make_unique<Node>(Node{work}));
  Node* made = recording->nodes.back().get();
  if (last) recording->edges.push_back({last, made});
  last = made;
}

inline void run(const Graph& graph) {
  std::map<Node*, int> waiting;
  for (auto& edge : graph.edges) ++waiting[edge.second];
  std::vector<Node*> ready;
  for (auto& node : graph.nodes)
    if (!waiting[node.get()]) ready.push_back(node.get());
  for (size_t done = 0; done < graph.nodes.size(); ++done) {
    if (ready.empty()) std::abort();  // a circle
    std::swap(ready[random_source() % ready.size()], ready.back());
    Node* node = ready.back();
    ready.pop_back();
    node->work();
    for (auto& edge : graph.edges)
      if (edge.first == node && !--waiting[edge.second]) ready.push_back(edge.second);
  }
}

}  // namespace emulator

extern "C" {

using emulator::Graph;
using emulator::Node;

inline constexpr int kInvalid = 1;

__attribute__((used)) inline const char* cudaGetErrorString(int) { return "invalid argument"; }
__attribute__((used)) inline int cudaStreamCreate(void** stream) { return *stream = new char, 0; }
__attribute__((used)) inline int cudaStreamDestroy(void* stream) { return delete static_cast<char*>(stream), 0; }

__attribute__((used)) inline int cudaStreamBeginCapture(void* stream, int) {
  if (emulator::recording) return kInvalid;
  emulator::recording = new Graph;
  emulator::recorded_stream = stream;
  emulator::last = nullptr;
  return 0;
}
__attribute__((used)) inline int cudaStreamEndCapture(void* stream, Graph** graph) {
  if (!emulator::recording || stream != emulator::recorded_stream) return kInvalid;
  *graph = std::exchange(emulator::recording, nullptr);
  return 0;
}

__attribute__((used)) inline int cudaGraphGetEdges(Graph* graph, Node** from, Node** to, void*, size_t* count) {
  if (from)
    for (size_t n = 0; n < *count; ++n) from[n] = graph->edges[n].first, to[n] = graph->edges[n].second;
  *count = graph->edges.size();
  return 0;
}
__attribute__((used)) inline int cudaGraphGetRootNodes(Graph* graph, Node** roots, size_t* count) {
  size_t found = 0;
  for (auto& node : graph->nodes) {
    bool root = true;
    for (auto& edge : graph->edges) root &= edge.second != node.get();
    if (root && found++ < *count && roots) roots[found - 1] = node.get();
  }
  *count = found;
  return 0;
}
__attribute__((used)) inline int cudaGraphRemoveDependencies(Graph* graph, Node** from, Node** to, void*, size_t count) {
  for (size_t n = 0; n < count; ++n) {
    auto at = std::find(graph->edges.begin(), graph->edges.end(), std::make_pair(from[n], to[n]));
    if (at == graph->edges.end()) return kInvalid;
    graph->edges.erase(at);
  }
  return 0;
}
__attribute__((used)) inline int cudaGraphAddDependencies(Graph* graph, Node** from, Node** to, void*, size_t count) {
  for (size_t n = 0; n < count; ++n) {
    if (std::find(graph->edges.begin(), graph->edges.end(), std::make_pair(from[n], to[n])) != graph->edges.end()) return kInvalid;
    graph->edges.push_back({from[n], to[n]});
  }
  return 0;
}

__attribute__((used)) inline int cudaGraphInstantiate(Graph** runnable, Graph* graph, unsigned long long) {
  auto* made = new Graph;
  std::map<Node*, Node*> copies;
  for (auto& node : graph->nodes) {
    made->nodes.push_back(std::make_unique<Node>(*node));
    copies[node.get()] = made->nodes.back().get();
  }
  for (auto& edge : graph->edges) made->edges.push_back({copies[edge.first], copies[edge.second]});
  *runnable = made;
  return 0;
}
__attribute__((used)) inline int cudaGraphLaunch(Graph* runnable, void*) { return ++emulator::launched, emulator::run(*runnable), 0; }
__attribute__((used)) inline int cudaGraphDestroy(Graph* graph) { return delete graph, 0; }
__attribute__((used)) inline int cudaGraphExecDestroy(Graph* graph) { return delete graph, 0; }
__attribute__((used)) inline long emulator_launched() { return emulator::launched; }
}
