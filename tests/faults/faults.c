/* Loaded before libc: makes the n-th call of one function fail, and lets the wall clock jump. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char failing[32];
static int left, with, fired;
static long jump_s;

void lifl_fail(const char *name, int nth, int error) {
  strncpy(failing, name, sizeof failing - 1);
  left = nth, with = error, fired = 0;
}
int lifl_fired(void) { return fired; }
/* Also by the environment, for processes that are started: "fork 3 11". */
__attribute__((constructor)) static void begin(void) {
  const char *said = getenv("LIFL_FAULT");
  char name[32];
  int nth, error;
  if (said && sscanf(said, "%31s %d %d", name, &nth, &error) == 3) lifl_fail(name, nth, error);
}
void lifl_jump(long seconds) { jump_s = seconds; }

static int fails(const char *name) {
  if (!left || strcmp(name, failing) || --left) return 0;
  fired = 1;
  errno = with;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int memfd_create(const char *name, unsigned flags) { return fails("memfd_create") ? -1 : REAL(memfd_create)(name, flags); }
int posix_fallocate(int fd, off_t at, off_t n) { return fails("posix_fallocate") ? with : REAL(posix_fallocate)(fd, at, n); }
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
  if (!fails("pwrite")) return REAL(pwrite)(fd, from, n, at);
  return with ? -1 : (ssize_t)(n / 2); /* a short write */
}
ssize_t pread(int fd, void *to, size_t n, off_t at) {
  if (!fails("pread")) return REAL(pread)(fd, to, n, at);
  return with ? -1 : (ssize_t)(n / 2);
}
void *mmap(void *at, size_t n, int how, int flags, int fd, off_t offset) {
  if ((flags & MAP_SHARED) && fails("mmap")) return MAP_FAILED;
  return REAL(mmap)(at, n, how, flags, fd, offset);
}
int eventfd(unsigned value, int flags) { return fails("eventfd") ? -1 : REAL(eventfd)(value, flags); }
int socketpair(int domain, int type, int protocol, int fds[2]) {
  return fails("socketpair") ? -1 : REAL(socketpair)(domain, type, protocol, fds);
}
ssize_t send(int fd, const void *from, size_t n, int flags) { return fails("send") ? -1 : REAL(send)(fd, from, n, flags); }
int poll(struct pollfd *fds, nfds_t n, int timeout) { return fails("poll") ? -1 : REAL(poll)(fds, n, timeout); }
pid_t fork(void) { return fails("fork") ? -1 : REAL(fork)(); }

int clock_gettime(clockid_t clock, struct timespec *t) {
  int result = REAL(clock_gettime)(clock, t);
  if (clock == CLOCK_REALTIME) t->tv_sec += jump_s;
  return result;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
int gettimeofday(struct timeval *t, void *zone) {
  int result = REAL(gettimeofday)(t, zone);
  t->tv_sec += jump_s;
  return result;
}
