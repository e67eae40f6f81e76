#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "table.h"

namespace peftfast::cpu {
namespace {

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

// Linux keeps the registers of matrix tiles for a process that has asked.
bool may_use_matrix_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

struct Isa {
  const char* name;
  bool (*supported)();
  const Table* table;
};

// Best first. The features are those of the target region at the top of each instruction set's .cpp; the compiler's
// own check covers the CPU and the operating system's part (saved registers).
const Isa isas[] = {
#if defined(PEFTFAST_EMULATE_AVX512)  // all of avx512 but its products in bf16 is in these two as well
    {"amx", [] { return true; }, &amx_table},
    {"avx512_bf16", [] { return true; }, &avx512_bf16_table},
#else
    {"amx",
     [] {
       return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
              may_use_matrix_tiles();
     },
     &amx_table},
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_table},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     &avx512_table},
#endif
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     &avx2_table},
    {"scalar", [] { return true; }, &scalar_table},
};

const Isa& choose() {
  const char* forced = std::getenv("PEFTFAST_CPU_ISA");
  std::string names;
  for (const Isa& isa : isas) {
    if (!isa.supported()) continue;
    if (forced == nullptr || *forced == '\0' || std::string(forced) == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("PEFTFAST_CPU_ISA is '" + std::string(forced) +
                              "', but this machine and build run: " + names + ".");
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace

const Table& table() { return *isa().table; }

int isa_count() { return static_cast<int>(std::size(isas)); }

IsaInfo isa_info(int index) { return {isas[index].name, isas[index].supported()}; }

const char* isa_in_use() { return isa().name; }

}  // namespace peftfast::cpu
