// Lets a library that is linked on a new system run on an old one: with glibc 2.28 and the libstdc++ of GCC 8, which is
// what torch's own wheels ask for (manylinux_2_28). The linker takes the newest version of a function that it finds;
// here each that is newer has another in its place. build_support gives the linker a --wrap for each name in this file, and
// a test holds the libraries to the bound (tests/package/test_binary.py). On x86-64 alone.
#include <new>
#include <sstream>

// A function of glibc by an older version, which is still in every later one. Of those that moved from libpthread,
// libdl and librt into libc (2.34) it is the same function. torch's libraries bring these three into the process where
// they still are apart. (exp sets errno as SVID wants, and is otherwise the same.)
#define OLD_FUNCTION(name, version)                                                                         \
  __asm__(".symver old_" #name ", " #name "@GLIBC_" version "\n.pushsection .text\n.hidden __wrap_" #name   \
          "\n.globl __wrap_" #name "\n.type __wrap_" #name ", @function\n__wrap_" #name ": jmp *old_" #name \
          "@GOTPCREL(%rip)\n.size __wrap_" #name ", .-__wrap_" #name "\n.popsection");

OLD_FUNCTION(pthread_mutex_trylock, "2.2.5")
OLD_FUNCTION(dlsym, "2.2.5")  // from torch 2.14's headers on
OLD_FUNCTION(exp, "2.2.5")

#ifdef SOFTMAX_EXT_CUDA_RUNTIME
// What CUDA's run-time library asks for, which is linked into ours.
OLD_FUNCTION(dlclose, "2.2.5")
OLD_FUNCTION(dlerror, "2.2.5")
OLD_FUNCTION(dlmopen, "2.3.4")
OLD_FUNCTION(dlopen, "2.2.5")
OLD_FUNCTION(dlvsym, "2.2.5")
OLD_FUNCTION(pthread_condattr_setpshared, "2.2.5")
OLD_FUNCTION(pthread_create, "2.2.5")
OLD_FUNCTION(pthread_detach, "2.2.5")
OLD_FUNCTION(pthread_getspecific, "2.2.5")
OLD_FUNCTION(pthread_join, "2.2.5")
OLD_FUNCTION(pthread_key_create, "2.2.5")
OLD_FUNCTION(pthread_key_delete, "2.2.5")
OLD_FUNCTION(pthread_kill, "2.2.5")
OLD_FUNCTION(pthread_mutexattr_destroy, "2.2.5")
OLD_FUNCTION(pthread_mutexattr_init, "2.2.5")
OLD_FUNCTION(pthread_mutexattr_setpshared, "2.2.5")
OLD_FUNCTION(pthread_mutexattr_settype, "2.2.5")
OLD_FUNCTION(pthread_once, "2.2.5")
OLD_FUNCTION(pthread_rwlock_destroy, "2.2.5")
OLD_FUNCTION(pthread_rwlock_init, "2.2.5")
OLD_FUNCTION(pthread_rwlock_rdlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_timedrdlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_timedwrlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_tryrdlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_trywrlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_unlock, "2.2.5")
OLD_FUNCTION(pthread_rwlock_wrlock, "2.2.5")
OLD_FUNCTION(pthread_rwlockattr_destroy, "2.2.5")
OLD_FUNCTION(pthread_rwlockattr_init, "2.2.5")
OLD_FUNCTION(pthread_rwlockattr_setpshared, "2.2.5")
OLD_FUNCTION(pthread_setspecific, "2.2.5")
OLD_FUNCTION(pthread_spin_destroy, "2.2.5")
OLD_FUNCTION(pthread_spin_init, "2.2.5")
OLD_FUNCTION(pthread_spin_lock, "2.2.5")
OLD_FUNCTION(pthread_spin_trylock, "2.2.5")
OLD_FUNCTION(pthread_spin_unlock, "2.2.5")
OLD_FUNCTION(sem_destroy, "2.2.5")
OLD_FUNCTION(sem_init, "2.2.5")
OLD_FUNCTION(sem_post, "2.2.5")
OLD_FUNCTION(sem_timedwait, "2.2.5")
OLD_FUNCTION(sem_trywait, "2.2.5")
OLD_FUNCTION(sem_wait, "2.2.5")
OLD_FUNCTION(shm_open, "2.2.5")
OLD_FUNCTION(shm_unlink, "2.2.5")
#endif

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
