// A plugin of QEMU's user-mode emulator: how many instructions a program executes, written to a file when it ends.
//
// qemu-aarch64 -plugin libinstructions.so,out=FILE PROGRAM
//
// The few functions of the plugin interface that it needs are declared here: distributions have no header for it.

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
typedef uint64_t qemu_plugin_id_t;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* block);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* block, void (*call)(unsigned, void*), int flags,
                                          void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void*), void* data);

EXPORT int qemu_plugin_version = PLUGIN_VERSION;

static uint64_t executed;
static char path[4096];

static void execute(unsigned processor, void* instructions) {
  (void)processor;
  __atomic_fetch_add(&executed, (uint64_t)(uintptr_t)instructions, __ATOMIC_RELAXED);
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(block, execute, 0, (void*)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void finish(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  FILE* file = fopen(path, "w");
  if (file == NULL) return;
  fprintf(file, "%" PRIu64 "\n", executed);
  fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void* system, int count, char** options) {
  (void)system;
  for (int n = 0; n < count; ++n) {
    if (strncmp(options[n], "out=", 4) == 0) snprintf(path, sizeof path, "%s", options[n] + 4);
  }
  if (path[0] == '\0') return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
