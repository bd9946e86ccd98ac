// Fibers: a stack each, and a switch between two of them in a few nanoseconds.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__  // finds what plain accesses to global memory miss
#include <sanitizer/asan_interface.h>
#endif

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define HOPE_FIBERS_IN_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace hope::emulator {

constexpr size_t kStackBytes = 256 << 10;  // reserved; only touched pages are backed by memory
constexpr size_t kGuardBytes = 64 << 10;   // the largest page there is

// Stacks with a guard below each, so that an overflow stops the program instead of changing a neighbour. Kept
// for reuse.
class Stacks {
 public:
  ~Stacks() {
    for (unsigned char* p : free_) munmap(p, kStackBytes);
  }
  unsigned char* take() {
    if (!free_.empty()) {
      unsigned char* p = free_.back();
      free_.pop_back();
#ifdef __SANITIZE_ADDRESS__
      // frames of a thread that never left them
      __asan_unpoison_memory_region(p + kGuardBytes, kStackBytes - kGuardBytes);
#endif
      return p;
    }
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kGuardBytes, PROT_NONE);
    return static_cast<unsigned char*>(p);
  }
  void give(unsigned char* p) { free_.push_back(p); }

 private:
  std::vector<unsigned char*> free_;
};

inline Stacks stacks;

#ifdef HOPE_FIBERS_IN_ASSEMBLY

// Saves the registers a callee must keep on this stack and its end in *from, then goes on where `to` was saved.
extern "C" void hope_emulator_switch(void** from, void* to) asm("hope_emulator_switch");

#ifdef __x86_64__
asm(R"(
.pushsection .text
.weak hope_emulator_switch
.type hope_emulator_switch, @function
hope_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hope_emulator_switch, . - hope_emulator_switch
.popsection
)");
// six registers, where to go on, and a null return address for the entry
constexpr int kSavedWords = 8, kEntryWord = 6;
#else
asm(R"(
.pushsection .text
.weak hope_emulator_switch
.type hope_emulator_switch, %function
hope_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size hope_emulator_switch, . - hope_emulator_switch
.popsection
)");
constexpr int kSavedWords = 20, kEntryWord = 11;
#endif

class Fiber {
 public:
  // Runs entry(), which must never return, at the first switch to it. `stack` of kStackBytes; `offset` (a
  // multiple of 64) spreads the fibers' hot ends over the sets of the cache.
  void start(unsigned char* stack, size_t offset, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes - offset) - kSavedWords;
    for (int i = 0; i < kSavedWords; ++i) top[i] = nullptr;
    top[kEntryWord] = reinterpret_cast<void*>(entry);
    saved_ = top;
  }
  void switch_to(Fiber& other) { hope_emulator_switch(&saved_, other.saved_); }

 private:
  void* saved_ = nullptr;
};

#else

class Fiber {  // portable, with a system call a switch
 public:
  void start(unsigned char* stack, size_t, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace hope::emulator
