/* What the library is of, which of its kernels run here, and how weights are laid out. */

#define TARGET AVX512

#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

/* A checksum of the sources, by which the loader tells an older library. */
EXPORT uint32_t bge_sources(void) { return BGE_SOURCES; }

/* What keeps kernels from running; otherwise the system's error, which is above 0. */
enum { NOTHING = 0, PROCESSOR = -1 };

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
}

/* By number, since Clang 14 does not know this one by name. */
static int has_avx512_bf16(void) {
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

static int has_amx(void) {
    unsigned a, b, c, d;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
    const unsigned all = amx_bf16 | amx_tile | amx_int8;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all;
}

/* Why the kernels for AMX do not run here. The system is asked for the permission to use tiles,
 * which it refuses with ENOSPC where the alternate signal stack of any thread is too small to keep
 * them (Linux, arch/x86/kernel/fpu/xstate.c). */
EXPORT int bge_amx_lack(void) {
#ifdef BGE_TILES_EMULATED
    return has_avx512_bf16() ? NOTHING : PROCESSOR;
#endif
    if (!has_amx()) return PROCESSOR;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) ? errno : NOTHING;
}

/* Why those for AVX512-VNNI do not. */
EXPORT int bge_avx512_vnni_lack(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") ? NOTHING : PROCESSOR;
}

/* Why those for AVX512-BF16 do not. */
EXPORT int bge_avx512_bf16_lack(void) { return has_avx512_bf16() ? NOTHING : PROCESSOR; }

/* Lays out a weight of shape (outputs, inputs) as a right operand of as many pieces of 2 bytes, of
 * which each output has `inputs`. */
EXPORT KERNEL void bge_pack(const bf16 *weight, int64_t outputs, int64_t inputs, bf16 *packed) {
    to_right(weight, inputs, outputs, inputs / 32, packed);
}
