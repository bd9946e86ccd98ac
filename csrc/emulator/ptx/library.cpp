// What tools/ptx calls, through ctypes: programs made of decoded instructions, and launches.
#include <cstdio>

#include "grid.h"
#include "mbarrier.h"
#include "special.h"
#include "wgmma.h"

namespace hope::ptx {

const Forms& forms() {
  static const Forms all = [] {
    Forms f;
    add_arithmetic(f), add_floats(f), add_conversions(f), add_control(f), add_memory(f), add_exchange(f), add_tensor(f), add_warpgroup(f);
    add_mbarriers(f);
    return f;
  }();
  return all;
}

}  // namespace hope::ptx

using namespace hope::ptx;

extern "C" {

// The form of this name, as a pointer that stays valid, or null.
const void* hope_ptx_form(const char* name) {
  const auto found = forms().find(name);
  return found == forms().end() ? nullptr : &found->second;
}

int hope_ptx_special(const char* name) {
  for (size_t k = 0; k < std::size(kSpecials); ++k)
    if (!std::strcmp(kSpecials[k].name, name)) return static_cast<int>(k);
  return -1;
}

struct Record {  // an instruction, from Python
  const void* form;
  int32_t first, count;  // of its operands
  int32_t guard, negated, starts, line;
  int32_t first_register, register_count;  // that have to be no results of products under way
};

void* hope_ptx_program(const char* name, const Record* records, int n, const int32_t* operands, int operand_count,
                       const uint32_t* constants, int constant_slots, const int32_t* specials, int special_count,
                       const int32_t* true_predicates, int true_count, const int32_t* registers, int register_count,
                       int slots, int predicates, int single_bytes, int has_mbarriers, int local_bytes,
                       const char* const* texts) {
  auto p = std::make_unique<Program>();
  p->name = name;
  p->operands.assign(operands, operands + operand_count);
  // registers and constants are whole lines of the cache
  p->constants.assign(constants, constants + size_t(constant_slots) * 32);
  for (int k = 0; k < special_count; ++k) p->specials.push_back({specials[2 * k], specials[2 * k + 1]});
  p->true_predicates.assign(true_predicates, true_predicates + true_count);
  p->registers.assign(registers, registers + register_count);
  p->slots = slots, p->predicates = predicates, p->single_bytes = single_bytes;
  p->has_mbarriers = has_mbarriers, p->local_bytes = local_bytes;
  for (int k = 0; k < n; ++k) {
    const Record& r = records[k];
    const Form& form = *static_cast<const Form*>(r.form);
    p->instructions.push_back({form.run, p->operands.data() + r.first, r.count, r.guard, r.negated != 0, r.starts != 0,
                               form.together, r.register_count > 0, p->registers.data() + r.first_register,
                               r.register_count, k, r.line});
    p->texts.push_back(texts[k]);
  }
  p->counts.resize(n);
  return p.release();
}

void hope_ptx_free(void* program) { delete static_cast<Program*>(program); }

struct LaunchRecord {
  uint32_t grid[3];
  int32_t threads, cluster;
  uint64_t shared_bytes;
  uint64_t seed;
  int32_t resident, races, measure;
  uint64_t parameter_bytes;
  const unsigned char* parameters;
  int32_t region_count;
  const uint64_t* regions;  // address, bytes
  const char* const* region_names;
};

// 0, or 1 with what went wrong in `error`.
int hope_ptx_launch(void* program, const LaunchRecord* l, char* error, int error_bytes) {
  try {
    std::vector<Region> regions;
    for (int k = 0; k < l->region_count; ++k)
      regions.push_back({l->regions[2 * k], l->regions[2 * k + 1], l->region_names[k], nullptr});
    Options options{l->seed, l->resident, l->races != 0, l->measure != 0};
    Shape shape{{l->grid[0], l->grid[1], l->grid[2]}, l->threads, l->cluster, l->shared_bytes};
    Grid grid(*static_cast<Program*>(program), shape, options, l->parameters, l->parameter_bytes, regions);
    grid.run();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

void hope_ptx_counts(void* program, uint64_t* to) {
  for (const Count& c : static_cast<Program*>(program)->counts) {
    *to++ = c.executed, *to++ = c.lanes, *to++ = c.bytes, *to++ = c.wavefronts, *to++ = c.sectors;
  }
}
void hope_ptx_reset_counts(void* program) {
  for (Count& c : static_cast<Program*>(program)->counts) c = {};
}

}  // extern "C"
