// Lets a library that is linked on a new system run on an old one: with glibc 2.28 and the libstdc++ of GCC 8, which is what
// torch's own wheels ask for (manylinux_2_28). The linker takes the newest version of a function that it finds; here each
// that is newer has another in its place. setup.py gives the linker a --wrap for each name in this file, and a test holds
// the libraries to the bound (tests/test_binary.py). On x86-64 alone.
#include <new>
#include <sstream>

// A function of glibc of which a first version is still in every later one. Those that have an older one only because they
// moved from libpthread or libdl into libc are the same function. exp, log and pow then also set errno as SVID wants.
#define OLD_FUNCTION(name)                                                                          \
  __asm__(".symver old_" #name ", " #name                                                           \
          "@GLIBC_2.2.5\n"                                                                          \
          ".pushsection .text\n"                                                                    \
          ".hidden __wrap_" #name "\n.globl __wrap_" #name "\n.type __wrap_" #name ", @function\n"  \
          "__wrap_" #name ": jmp *old_" #name "@GOTPCREL(%rip)\n.size __wrap_" #name ", .-__wrap_" #name \
          "\n.popsection");

OLD_FUNCTION(exp)
OLD_FUNCTION(pthread_mutex_trylock)

#define REPLACED(name) extern "C" [[gnu::visibility("hidden")]] void __wrap_##name

// std::__throw_bad_array_new_length() of GCC 11
REPLACED(_ZSt28__throw_bad_array_new_lengthv)() { throw std::bad_array_new_length(); }

// The constructors without arguments of std::ostringstream and std::stringstream, of GCC 9
REPLACED(_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev)(void* place) {
  new (place) std::ostringstream(std::ios_base::out);
}
REPLACED(_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev)(void* place) {
  new (place) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// glibc 2.32's word that there is one thread only, with which libstdc++ counts references faster. Here there never is.
[[gnu::visibility("hidden")]] char never_single_threaded __asm__("__libc_single_threaded") = 0;
