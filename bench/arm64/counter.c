// A plugin of QEMU that counts instructions, and prints the count where the program asks for it: by getpriority of a
// kind that there is not, and a number that says what it is about.
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

// What is used of qemu-plugin.h, version 1, which Debian has no package of.
#define EXPORT __attribute__((visibility("default")))
typedef uint64_t Id;
struct qemu_plugin_tb;
enum Operation { ADD_U64 };
typedef void (*Translated)(Id, struct qemu_plugin_tb*);
typedef void (*Called)(Id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(Id, Translated);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, enum Operation, void* counter, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(Id, Called);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
EXPORT int qemu_plugin_version = 1;

enum { GETPRIORITY = 141, ASKED = 4242 };
static uint64_t count;

static void translated(Id id, struct qemu_plugin_tb* block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &count, qemu_plugin_tb_n_insns(block));
}

static void called(Id id, unsigned cpu, int64_t number, uint64_t kind, uint64_t about, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)cpu, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number != GETPRIORITY || kind != ASKED) return;
  fprintf(stderr, "counted %" PRIu64 " %" PRIu64 "\n", about, count);
  fflush(stderr);
}

EXPORT int qemu_plugin_install(Id id, const void* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
