// A kernel as the machine runs it: decoded by tools/ptx, one record an instruction.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace hope::ptx {

struct Warp;
struct Instruction;

enum class Next {
  kFollowing,  // the instruction after this one
  kJump,       // wherever the warp's pc points now
  kWait,       // another warp's turn; this one goes on at its pc when its wait is over
  kTurn,       // another warp's turn; this one remains ready
};

// What an instruction does to the lanes of `mask`.
using Run = Next (*)(Warp&, const Instruction&, uint32_t mask);

struct Instruction {
  Run run;
  const int32_t* operands;  // registers (see Warp::lanes), predicates and attributes, as the form defines
  int32_t operand_count;
  int32_t guard;    // predicate, or -1
  bool negated;     // runs where the guard is false
  bool starts;      // a block of instructions starts here: control may arrive from elsewhere
  bool together;    // all lanes of the warp have to be here
  bool waits;       // for its registers to be no results of asynchronous products under way
  const int32_t* registers;  // places that it reads or writes, if it waits
  int32_t register_count;
  int32_t index, line;
};

// What was executed of an instruction, summed over warps.
struct Count {
  uint64_t executed, lanes;
  uint64_t bytes;       // of memory, by all lanes
  uint64_t wavefronts;  // passes of shared memory: 1 unless lanes ask for different words of a bank
  uint64_t sectors;     // 32-byte sectors of global memory, each once an instruction
};

struct Special {  // a special register, filled in when a warp starts
  int32_t which, at;
};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<int32_t> operands, registers;
  std::vector<uint32_t> constants;   // lanes of the immediates
  std::vector<Special> specials;
  std::vector<int32_t> true_predicates;
  std::vector<Count> counts;
  std::vector<std::string> texts;
  std::string name;
  int slots = 0, predicates = 0;  // of a warp: 128-byte registers, and predicates
  int local_bytes = 0;  // memory of a lane
  bool single_bytes = false;  // single bytes of memory are accessed
  bool has_mbarriers = false;
};

}  // namespace hope::ptx
