/* lifl_step(): what STEP() in _shm.c calls when it is compiled for these tests. Counts the steps of this
 * process in a page that the test shares, and sends a signal to itself at the one that it was told. */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

struct control { /* one per participant; the test writes it while the participant sleeps */
  int64_t count, target, next, signal;
};

static volatile struct control *mine;

void lifl_steps_use(const char *path, uint32_t me) {
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) _exit(70);
  void *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (page == MAP_FAILED) _exit(71);
  mine = (volatile struct control *)page + me;
}

void lifl_step(void) {
  if (!mine || ++mine->count != mine->target) return;
  mine->target = mine->next; /* for the successor */
  mine->next = mine->count = 0;
  kill(getpid(), (int)mine->signal);
}
