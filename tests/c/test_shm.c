/* Tests of the C core without Python: one program, one function for each promise. A failed CHECK says
 * where and ends the program; the sanitizers say the rest. */
#define _GNU_SOURCE
#include "_shm.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
      exit(1);                                                                    \
    }                                                                             \
  } while (0)

#define UNIT 65536u
#define SECOND 1000000000ull
#define UNITS 16u

static lifl_arena *arena_of(uint32_t units, uint32_t participants) {
  lifl_arena *a = NULL;
  CHECK(lifl_arena_create((uint64_t)units * UNIT, participants, 42, &a) == LIFL_OK);
  return a;
}

static uint32_t alloc(lifl_arena *a, uint64_t nbytes, uint32_t *generation) {
  uint32_t block = lifl_none();
  CHECK(lifl_block_alloc(a, nbytes, 0, LIFL_WRITING, &block, generation) == LIFL_OK);
  return block;
}

static uint8_t *map(lifl_arena *a, uint32_t block, uint32_t generation, uint64_t nbytes) {
  void *address = NULL;
  uint64_t n = 0;
  CHECK(lifl_block_map(a, block, generation, &address, &n) == LIFL_OK);
  CHECK(n == nbytes);
  return address;
}

/* Runs `child` in a fork with an arena handle of its own; its exit status must be 0 at `join`. */
static pid_t fork_with(lifl_arena *a, void (*child)(lifl_arena *, uint64_t), uint64_t argument) {
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    lifl_arena *own = NULL;
    CHECK(lifl_arena_attach(lifl_arena_fd(a), &own) == LIFL_OK);
    child(own, argument);
    lifl_arena_detach(own);
    _exit(0);
  }
  return pid;
}

static void join(pid_t pid) {
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---------------------------------------------------------------- arena */

static void test_create_and_attach(void) {
  lifl_arena *a = arena_of(UNITS, 3), *b = NULL;
  CHECK(lifl_arena_units(a) == UNITS && lifl_arena_free_units(a) == UNITS);
  CHECK(lifl_arena_participants(a) == 3 && lifl_arena_node_id(a) == 42);
  struct stat st;
  CHECK(fstat(lifl_arena_fd(a), &st) == 0 && (uint64_t)st.st_size == lifl_arena_total_bytes(a));
  CHECK((uint64_t)st.st_blocks * 512 >= lifl_arena_total_bytes(a)); /* taken at once */
  CHECK(fcntl(lifl_arena_fd(a), F_GETFD) & FD_CLOEXEC);
  CHECK(fcntl(lifl_arena_fd(a), F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
  CHECK(lifl_arena_attach(lifl_arena_fd(a), &b) == LIFL_OK);
  CHECK(lifl_arena_fd(b) != lifl_arena_fd(a) && lifl_arena_units(b) == UNITS);
  uint32_t g, block = alloc(a, 100, &g), x;
  memset(map(a, block, g, 100), 7, 100);
  lifl_arena_detach(a); /* the other handle keeps everything */
  CHECK(map(b, block, g, 100)[99] == 7);
  CHECK(lifl_block_alloc(b, 1, 0, LIFL_WRITING, &x, &x) == LIFL_EINVAL); /* only the creator allocates */
  lifl_arena_detach(b);
  lifl_arena_detach(NULL);
}

static void test_senseless_arguments(void) {
  lifl_arena *a = NULL;
  CHECK(lifl_arena_create(0, 2, 0, &a) == LIFL_EINVAL);
  CHECK(lifl_arena_create(UNIT, 0, 0, &a) == LIFL_EINVAL);
  CHECK(lifl_arena_create(UNIT, 1025, 0, &a) == LIFL_EINVAL);
  CHECK(lifl_arena_create(UINT64_MAX / 2, 1, 0, &a) == LIFL_EINVAL);
  CHECK(lifl_arena_attach(-1, &a) == LIFL_ESYS && errno == EBADF);
  a = arena_of(2, 2);
  uint32_t x, g;
  uint64_t n;
  void *address;
  lifl_note *note;
  lifl_desc d = {0};
  CHECK(lifl_block_alloc(a, 1, 2, LIFL_WRITING, &x, &g) == LIFL_EINVAL);
  CHECK(lifl_block_map(a, 2, 1, &address, &n) == LIFL_EINVAL);
  CHECK(lifl_block_read(a, lifl_none(), &x, &x, &x, &n, &x) == LIFL_EINVAL);
  CHECK(lifl_block_move(a, 2, 1, 0, 0, 0, 0) == LIFL_EINVAL);
  CHECK(lifl_block_move(a, 0, 1, 0, 0, 2, 0) == LIFL_EINVAL);
  CHECK(lifl_block_reclaim(a, 2, 1, 0) == LIFL_EINVAL);
  CHECK(lifl_block_note(a, 2, &note) == LIFL_EINVAL);
  CHECK(lifl_ring_push(a, 0, 2, &d) == LIFL_EINVAL && lifl_ring_push(a, 2, 0, &d) == LIFL_EINVAL);
  CHECK(lifl_ring_pop(a, 0, 2, &d) == LIFL_EINVAL && lifl_inbox_pop(a, 2, &d, &x) == LIFL_EINVAL);
  CHECK(lifl_inbox_wait(a, 2, 0, 0) == LIFL_EINVAL && lifl_inbox_arm(a, 2) == LIFL_EINVAL);
  CHECK(lifl_credit_take(a, 0, 2, &x) == LIFL_EINVAL && lifl_credit_take(a, 2, 0, &x) == LIFL_EINVAL);
  CHECK(lifl_credit_untake(a, 0, 2) == LIFL_EINVAL && lifl_credit_untake(a, 2, 0) == LIFL_EINVAL);
  CHECK(lifl_credit_give(a, 0, 2, 0) == LIFL_EINVAL && lifl_credit_give(a, 2, 0, 0) == LIFL_EINVAL);
  CHECK(lifl_credit_reset(a, 2) == LIFL_EINVAL && lifl_inbox_counts(a, 2, &n, &n) == LIFL_EINVAL);
  CHECK(lifl_peer_wake(a, 2) == LIFL_EINVAL && lifl_peer_eventfd(a, 2, 0) == LIFL_EINVAL);
  CHECK(lifl_dtype_bytes(10) == 0 && lifl_sum_bytes(10) == 0);
  lifl_arena_detach(a);
}

static void test_corrupt_header(void) {
  lifl_arena *a = arena_of(4, 2), *b = NULL;
  uint8_t header[72];
  CHECK(pread(lifl_arena_fd(a), header, sizeof header, 0) == sizeof header);
  for (size_t i = 0; i <= sizeof header; i++) {
    int fd = memfd_create("forged", 0);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)lifl_arena_total_bytes(a)) == 0);
    if (i < sizeof header) header[i] ^= 0x55;
    CHECK(pwrite(fd, header, sizeof header, 0) == sizeof header);
    /* The node's id (24..31) and the reserved word (44..47) may be anything. */
    int is_free = i == sizeof header || (i >= 24 && i < 32) || (i >= 44 && i < 48);
    CHECK(lifl_arena_attach(fd, &b) == (is_free ? LIFL_OK : LIFL_ECORRUPT));
    if (is_free) lifl_arena_detach(b);
    if (i < sizeof header) header[i] ^= 0x55;
    CHECK(ftruncate(fd, (off_t)lifl_arena_total_bytes(a) - 1) == 0);
    CHECK(lifl_arena_attach(fd, &b) == LIFL_ECORRUPT);
    close(fd);
  }
  lifl_arena_detach(a);
}

/* ---------------------------------------------------------------- blocks */

static void test_alloc_until_full(void) {
  lifl_arena *a = arena_of(UNITS, 1);
  uint32_t g[UNITS], blocks[UNITS], x;
  for (uint32_t i = 0; i < UNITS; i++) {
    blocks[i] = alloc(a, i % 2 ? UNIT : 0, &g[i]);
    CHECK(lifl_arena_free_units(a) == UNITS - 1 - i);
  }
  CHECK(lifl_block_alloc(a, 1, 0, LIFL_WRITING, &x, &x) == LIFL_FULL);
  CHECK(lifl_block_alloc(a, UINT64_MAX - UNIT, 0, LIFL_WRITING, &x, &x) == LIFL_FULL);
  for (uint32_t i = 0; i < UNITS; i++) {
    CHECK(lifl_block_reclaim(a, blocks[i], g[i], 0) == LIFL_OK);
    CHECK(lifl_block_reclaim(a, blocks[i], g[i], 0) == LIFL_STALE);
  }
  CHECK(lifl_arena_free_units(a) == UNITS);
  lifl_arena_detach(a);
}

static void test_fragmented_block_is_one_run(void) {
  lifl_arena *a = arena_of(UNITS, 1);
  uint32_t g[UNITS], blocks[UNITS], generation, owner, state, extents;
  uint64_t nbytes, wanted = (uint64_t)UNITS / 2 * UNIT - 3;
  for (uint32_t i = 0; i < UNITS; i++) blocks[i] = alloc(a, UNIT, &g[i]);
  for (uint32_t i = 0; i < UNITS; i += 2) CHECK(lifl_block_reclaim(a, blocks[i], g[i], 1) == LIFL_OK);
  uint32_t big = alloc(a, wanted, &generation);
  CHECK(lifl_block_read(a, big, &generation, &owner, &state, &nbytes, &extents) == LIFL_OK);
  CHECK(extents == UNITS / 2 && nbytes == wanted && owner == 0 && state == LIFL_WRITING);
  uint8_t *p = map(a, big, generation, wanted);
  for (uint64_t i = 0; i < wanted; i++) CHECK(p[i] == 0xa5); /* poisoned when it was freed */
  for (uint64_t i = 0; i < wanted; i++) p[i] = (uint8_t)(i * 7 + i / UNIT);
  for (uint32_t i = 1; i < UNITS; i += 2) memset(map(a, blocks[i], g[i], UNIT), 0, UNIT);
  uint8_t *again = map(a, big, generation, wanted);
  CHECK(again != p);
  for (uint64_t i = 0; i < wanted; i++) CHECK(again[i] == (uint8_t)(i * 7 + i / UNIT));
  CHECK(lifl_block_unmap(a, p, wanted) == LIFL_OK && lifl_block_unmap(a, again, wanted) == LIFL_OK);
  CHECK(lifl_block_reclaim(a, big, generation, 0) == LIFL_OK);
  for (uint32_t i = 1; i < UNITS; i += 2) CHECK(lifl_block_reclaim(a, blocks[i], g[i], 0) == LIFL_OK);
  CHECK(lifl_arena_free_units(a) == UNITS);
  lifl_arena_detach(a);
}

static void test_stale_moves_fail(void) {
  lifl_arena *a = arena_of(1, 3);
  uint32_t old, now, block = alloc(a, 10, &old), generation, owner, state, extents;
  uint64_t nbytes;
  void *address;
  CHECK(lifl_block_reclaim(a, block, old, 0) == LIFL_OK);
  CHECK(alloc(a, 20, &now) == block && now != old);
  CHECK(lifl_block_map(a, block, old, &address, &nbytes) == LIFL_STALE);
  CHECK(lifl_block_move(a, block, old, 0, LIFL_WRITING, 1, LIFL_READY) == LIFL_STALE);
  CHECK(lifl_block_reclaim(a, block, old, 0) == LIFL_STALE);
  CHECK(lifl_block_move(a, block, now, 1, LIFL_WRITING, 1, LIFL_READY) == LIFL_STALE);
  CHECK(lifl_block_move(a, block, now, 0, LIFL_READY, 1, LIFL_READY) == LIFL_STALE);
  CHECK(lifl_block_move(a, block, now, 0, LIFL_WRITING, 1, LIFL_READY) == LIFL_OK);
  CHECK(lifl_block_move(a, block, now, 0, LIFL_WRITING, 2, LIFL_READY) == LIFL_STALE);
  CHECK(lifl_block_reclaim(a, block, now, 0) == LIFL_STALE); /* a worker's */
  CHECK(lifl_block_read(a, block, &generation, &owner, &state, &nbytes, &extents) == LIFL_OK);
  CHECK(generation == now && owner == 1 && state == LIFL_READY && nbytes == 20 && extents == 1);
  CHECK(lifl_block_move(a, block, now, 1, LIFL_READY, 0, LIFL_FREE) == LIFL_OK);
  CHECK(lifl_block_reclaim(a, block, now, 0) == LIFL_OK);
  lifl_arena_detach(a);
}

static void take_once(lifl_arena *a, uint64_t me) {
  uint32_t generation, owner, state, extents, won = 0;
  uint64_t nbytes;
  for (uint32_t block = 0; block < lifl_arena_units(a); block++) {
    CHECK(lifl_block_read(a, block, &generation, &owner, &state, &nbytes, &extents) == LIFL_OK);
    won += lifl_block_move(a, block, generation, 0, LIFL_READY, (uint32_t)me, LIFL_READING) == LIFL_OK;
  }
  CHECK(won <= lifl_arena_units(a));
}

static void test_each_block_is_taken_once(void) {
  enum { MANY = 2000 };
  lifl_arena *a = arena_of(MANY, 4);
  uint32_t g, owner, state, extents, owned[4] = {0};
  uint64_t nbytes;
  for (uint32_t i = 0; i < MANY; i++) CHECK(lifl_block_alloc(a, 1, 0, LIFL_READY, &owner, &g) == LIFL_OK);
  pid_t pids[3];
  for (uint64_t i = 0; i < 3; i++) pids[i] = fork_with(a, take_once, i + 1);
  for (int i = 0; i < 3; i++) join(pids[i]);
  for (uint32_t i = 0; i < MANY; i++) {
    CHECK(lifl_block_read(a, i, &g, &owner, &state, &nbytes, &extents) == LIFL_OK && state == LIFL_READING);
    owned[owner]++;
  }
  CHECK(owned[0] == 0 && owned[1] + owned[2] + owned[3] == MANY);
  lifl_arena_detach(a);
}

/* ---------------------------------------------------------------- rings and wake-ups */

static void produce(lifl_arena *a, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    lifl_desc d = {(uint32_t)i, (uint32_t)~i, (uint32_t)(i * 3), (uint16_t)i, (uint16_t)(i >> 3)};
    while (lifl_ring_push(a, 1, 0, &d) == LIFL_FULL) sched_yield();
  }
}

/* Takes `count` descriptors, sleeping on the futex whenever there is none; returns how many sleeps
 * ended by their cap with something there, which is what a lost wake-up looks like. */
static uint64_t consume(lifl_arena *a, uint64_t count, uint64_t spin_ns) {
  uint64_t lost = 0;
  for (uint64_t i = 0; i < count;) {
    lifl_desc d;
    uint32_t producer = 0;
    if (lifl_inbox_pop(a, 0, &d, &producer) == LIFL_EMPTY) {
      uint64_t begin = lifl_now_ns();
      int status = lifl_inbox_wait(a, 0, spin_ns, 10 * SECOND);
      CHECK(status == LIFL_OK || status == LIFL_TIMEOUT);
      lost += lifl_now_ns() - begin > 9 * SECOND;
      continue;
    }
    CHECK(producer == 1 && d.block == (uint32_t)i && d.generation == (uint32_t)~i && d.round == (uint32_t)(i * 3));
    CHECK(d.kind == (uint16_t)i && d.arg == (uint16_t)(i >> 3));
    i++;
  }
  return lost;
}

static void test_link_sends_and_pops(void) {
  lifl_arena *a;
  int fds[2];
  lifl_flow flow = {0};
  lifl_link_record got;
  CHECK(lifl_arena_create(1, 3, 1, &a) == LIFL_OK);
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
  CHECK(lifl_link_pop(a, fds[1], &flow, &got) == LIFL_EMPTY);
  int capacity = lifl_ring_capacity(a, 1, 2), sent = 0;
  for (uint32_t i = 0; lifl_link_send(a, fds[0], 1, 2, 2, 7, &(lifl_desc){i, 5, 6, 3, 4}) == LIFL_OK; i++) sent++;
  CHECK(sent == capacity);
  for (int i = 0; i < sent; i++) {
    CHECK(lifl_link_pop(a, fds[1], &flow, &got) == LIFL_OK);
    CHECK(got.block == (uint32_t)i && got.seq == (uint32_t)i && got.generation == 5 && got.round == 6);
    CHECK(got.dst == 2 && got.src == 1 && got.line == 2 && got.busy_us == 7 && got.kind == 3 && got.arg == 4);
  }
  CHECK(lifl_link_send(a, fds[0], 1, 2, 2, 0, &(lifl_desc){0}) == LIFL_OK); /* the credits have come back */
  CHECK(lifl_link_send(a, fds[0], 1, 3, 3, 0, &(lifl_desc){0}) == LIFL_EINVAL);
  /* A record in two pieces, of a participant that this arena has not; then one that it has. */
  lifl_link_record stranger = {.src = 9, .line = 2}, known = {.src = 0, .line = 2, .arg = 8};
  CHECK(write(fds[0], &stranger, 5) == 5);
  CHECK(lifl_link_pop(a, fds[1], &flow, &got) == LIFL_OK);
  CHECK(lifl_link_pop(a, fds[1], &flow, &got) == LIFL_EMPTY);
  CHECK(write(fds[0], (char *)&stranger + 5, sizeof stranger - 5) == (ssize_t)sizeof stranger - 5);
  CHECK(lifl_link_forward(fds[0], 0, (const uint8_t *)&known) == LIFL_OK);
  CHECK(lifl_link_fill(fds[1], 1, &flow) == LIFL_OK);
  CHECK(lifl_link_pop(a, fds[1], &flow, &got) == LIFL_OK && got.arg == 8);
  close(fds[0]);
  CHECK(lifl_link_fill(fds[1], 1, &flow) == LIFL_GONE);
  CHECK(lifl_link_send(a, fds[0], 1, 2, 2, 0, &(lifl_desc){0}) == LIFL_ESYS && errno == EBADF);
  CHECK(lifl_link_pop(a, -1, &flow, &got) == LIFL_ESYS && errno == EBADF);
  close(fds[1]);
  lifl_arena_detach(a);
}

static void test_ring_between_processes(void) {
  uint64_t spins[] = {0, 50000};
  for (int k = 0; k < 2; k++) {
    lifl_arena *a = arena_of(1, 2);
    pid_t pid = fork_with(a, produce, 100000);
    CHECK(consume(a, 100000, spins[k]) == 0);
    join(pid);
    lifl_desc d;
    CHECK(lifl_ring_pop(a, 1, 0, &d) == LIFL_EMPTY);
    lifl_arena_detach(a);
  }
}

static void echo(lifl_arena *a, uint64_t count) {
  for (uint64_t i = 0; i < count;) {
    lifl_desc d;
    if (lifl_ring_pop(a, 0, 1, &d) == LIFL_EMPTY) {
      lifl_inbox_wait(a, 1, 0, 10 * SECOND);
      continue;
    }
    CHECK(lifl_ring_push(a, 1, 0, &d) == LIFL_OK);
    i++;
  }
}

/* Both sides sleep in every turn. One lost wake-up would be a sleep of 10 s. */
static void test_no_wake_up_is_lost(void) {
  enum { TURNS = 20000 };
  lifl_arena *a = arena_of(1, 2);
  pid_t pid = fork_with(a, echo, TURNS);
  uint64_t begin = lifl_now_ns();
  for (uint32_t i = 0; i < TURNS; i++) {
    lifl_desc d = {.block = i};
    CHECK(lifl_ring_push(a, 0, 1, &d) == LIFL_OK);
    while (lifl_ring_pop(a, 1, 0, &d) == LIFL_EMPTY) {
      uint64_t asleep = lifl_now_ns();
      lifl_inbox_wait(a, 0, 0, 10 * SECOND);
      CHECK(lifl_now_ns() - asleep < 9 * SECOND);
    }
    CHECK(d.block == i);
  }
  CHECK(lifl_now_ns() - begin < 60 * SECOND);
  join(pid);
  lifl_arena_detach(a);
}

static void *produce_thread(void *arena) {
  lifl_desc d = {0};
  for (uint32_t i = 0; i < 5000; i++) {
    d.block = i;
    while (lifl_ring_push(arena, 1, 0, &d) == LIFL_FULL) sched_yield();
  }
  return NULL;
}

static void test_eventfd_rings_when_armed(void) {
  lifl_arena *a = arena_of(1, 2);
  int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  CHECK(fd >= 0 && lifl_peer_eventfd(a, 0, fd) == LIFL_OK);
  uint64_t value;
  lifl_desc d = {.block = 9};
  CHECK(lifl_ring_push(a, 1, 0, &d) == LIFL_OK);
  CHECK(read(fd, &value, sizeof value) < 0 && errno == EAGAIN); /* not armed: no system call */
  CHECK(lifl_inbox_arm(a, 0) == LIFL_OK);                       /* there is one already */
  CHECK(lifl_ring_pop(a, 1, 0, &d) == LIFL_OK && d.block == 9);
  CHECK(lifl_inbox_arm(a, 0) == LIFL_EMPTY);
  CHECK(lifl_ring_push(a, 1, 0, &d) == LIFL_OK && lifl_ring_push(a, 1, 0, &d) == LIFL_OK);
  CHECK(read(fd, &value, sizeof value) == sizeof value && value == 1);
  CHECK(lifl_ring_pop(a, 1, 0, &d) == LIFL_OK && lifl_ring_pop(a, 1, 0, &d) == LIFL_OK);
  /* A reader that blocks on the eventfd alone gets everything. */
  CHECK(fcntl(fd, F_SETFL, 0) == 0);
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, produce_thread, a) == 0);
  for (uint32_t i = 0; i < 5000;) {
    if (lifl_ring_pop(a, 1, 0, &d) == LIFL_OK) CHECK(d.block == i++);
    else if (lifl_inbox_arm(a, 0) == LIFL_EMPTY) CHECK(read(fd, &value, sizeof value) == sizeof value);
  }
  CHECK(pthread_join(thread, NULL) == 0);
  close(fd);
  lifl_arena_detach(a);
}

static void test_wait_returns_at_its_time(void) {
  lifl_arena *a = arena_of(1, 2);
  CHECK(lifl_inbox_wait(a, 0, 0, 0) == LIFL_TIMEOUT);
  CHECK(lifl_inbox_wait(a, 0, 0, SECOND / 100) == LIFL_TIMEOUT);
  CHECK(lifl_inbox_wait(a, 0, 1000, SECOND / 100) == LIFL_TIMEOUT);
  lifl_desc d = {0};
  CHECK(lifl_ring_push(a, 1, 0, &d) == LIFL_OK);
  CHECK(lifl_inbox_wait(a, 0, 0, 0) == LIFL_OK);
  lifl_arena_detach(a);
}

static void test_ring_is_full_at_its_capacity(void) {
  lifl_arena *a = arena_of(1, 2), *heir = NULL;
  int capacity = lifl_ring_capacity(a, 0, 1);
  lifl_desc d = {0};
  CHECK(capacity > 0 && lifl_ring_capacity(a, 0, 2) == LIFL_EINVAL);
  for (uint32_t lap = 0; lap < 5; lap++) {
    for (int i = 0; i < capacity; i++) CHECK(lifl_ring_push(a, 0, 1, &d) == LIFL_OK);
    CHECK(lifl_ring_push(a, 0, 1, &d) == LIFL_FULL);
    for (int i = 0; i < capacity - 1; i++) CHECK(lifl_ring_pop(a, 0, 1, &d) == LIFL_OK);
    d.block = lap;
    CHECK(lifl_ring_pop(a, 0, 1, &d) == LIFL_OK && lifl_ring_pop(a, 0, 1, &d) == LIFL_EMPTY);
  }
  /* A process that attaches later goes on where the shared counters stand. */
  d.block = 77;
  CHECK(lifl_ring_push(a, 0, 1, &d) == LIFL_OK);
  CHECK(lifl_arena_attach(lifl_arena_fd(a), &heir) == LIFL_OK);
  CHECK(lifl_ring_pop(heir, 0, 1, &d) == LIFL_OK && d.block == 77);
  CHECK(lifl_ring_push(heir, 0, 1, &d) == LIFL_OK);
  lifl_arena_detach(heir);
  lifl_arena_detach(a);
}

/* ---------------------------------------------------------------- credits */

static void take(lifl_arena *a, uint32_t from, uint32_t to, uint32_t expected) {
  uint32_t number = ~expected;
  CHECK(lifl_credit_take(a, from, to, &number) == LIFL_OK && number == expected);
}

static void counts(lifl_arena *a, uint32_t consumer, uint64_t sent, uint64_t taken) {
  uint64_t s = 0, t = 0;
  CHECK(lifl_inbox_counts(a, consumer, &s, &t) == LIFL_OK && s == sent && t == taken);
}

static void test_credits_bound_what_is_on_its_way(void) {
  lifl_arena *a = arena_of(1, 3);
  uint32_t capacity = (uint32_t)lifl_ring_capacity(a, 0, 1), next = 0, number;
  for (uint32_t lap = 0; lap < 5; lap++) {
    while (next < (lap + 1) * capacity) take(a, 0, 1, next++);
    CHECK(lifl_credit_take(a, 0, 1, &number) == LIFL_FULL);
    counts(a, 1, next, next - capacity);
    CHECK(lifl_credit_give(a, 0, 1, next - capacity) == LIFL_OK); /* one is drained: room for one */
    take(a, 0, 1, next);
    CHECK(lifl_credit_take(a, 0, 1, &number) == LIFL_FULL);
    CHECK(lifl_credit_untake(a, 0, 1) == LIFL_OK); /* it was not sent after all */
    counts(a, 1, next, next - capacity + 1);
    CHECK(lifl_credit_give(a, 0, 1, next - 1) == LIFL_OK); /* the last: what was before it will not come any more */
    CHECK(lifl_credit_give(a, 0, 1, next - 3) == LIFL_OK); /* which is known then */
    for (uint32_t ahead = 1; ahead; ahead <<= 1)           /* a number that was never taken says nothing */
      CHECK(lifl_credit_give(a, 0, 1, next - 1 + ahead) == LIFL_OK);
    counts(a, 1, next, next);
  }
  take(a, 0, 2, 0); /* every line has its own */
  take(a, 2, 1, 0);
  counts(a, 0, 0, 0);
  counts(a, 1, next + 1, next);
  counts(a, 2, 1, 0);
  lifl_arena_detach(a);
}

static void test_credits_of_the_dead_come_back(void) {
  lifl_arena *a = arena_of(1, 3), *heir = NULL;
  uint32_t capacity = (uint32_t)lifl_ring_capacity(a, 0, 1), number;
  for (uint32_t i = 0; i < capacity; i++) take(a, 0, 1, i);
  take(a, 2, 1, 0);
  take(a, 0, 2, 0);
  CHECK(lifl_credit_reset(a, 1) == LIFL_OK);
  counts(a, 1, capacity + 1, capacity + 1);
  counts(a, 2, 1, 0);
  for (uint32_t i = 0; i < capacity; i++) take(a, 0, 1, capacity + i);
  /* A process that attaches later goes on where the shared words stand. */
  CHECK(lifl_arena_attach(lifl_arena_fd(a), &heir) == LIFL_OK);
  CHECK(lifl_credit_take(heir, 0, 1, &number) == LIFL_FULL);
  CHECK(lifl_credit_give(heir, 0, 1, capacity) == LIFL_OK);
  take(heir, 0, 1, 2 * capacity);
  /* A reset comes between a taking and its undoing, and the sender dies of something else: its successor may send. */
  take(heir, 2, 1, 1);
  CHECK(lifl_credit_reset(a, 1) == LIFL_OK);
  CHECK(lifl_credit_untake(heir, 2, 1) == LIFL_OK);
  counts(a, 1, 2 * capacity + 3, 2 * capacity + 3);
  lifl_arena_detach(heir);
  CHECK(lifl_arena_attach(lifl_arena_fd(a), &heir) == LIFL_OK);
  take(heir, 2, 1, 1);
  lifl_arena_detach(heir);
  lifl_arena_detach(a);
}

/* ---------------------------------------------------------------- kernels */

static const uint64_t COUNTS[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 2047, 2048, 2049, 4096, 5001};
enum { NUM_COUNTS = sizeof COUNTS / sizeof *COUNTS, MOST = 5001, UPDATES = 9 };

static uint64_t seed = 88172645463325252ull;
static uint64_t next_random(void) {
  seed ^= seed << 13;
  seed ^= seed >> 7;
  return seed ^= seed << 17;
}

static double half_value(uint16_t h) {
  int e = h >> 10 & 31, m = h & 1023;
  double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
  return h & 0x8000 ? -v : v;
}

static double bfloat_value(uint16_t b) {
  int e = b >> 7 & 255, m = b & 127;
  double v = e ? ldexp(128 + m, e - 134) : ldexp(m, -133);
  return b & 0x8000 ? -v : v;
}

/* The naive reading of one element. */
static double value_of(uint32_t dtype, const void *x, uint64_t i) {
  switch (dtype) {
  case LIFL_FLOAT32: return ((const float *)x)[i];
  case LIFL_FLOAT64: return ((const double *)x)[i];
  case LIFL_FLOAT16: return half_value(((const uint16_t *)x)[i]);
  case LIFL_BFLOAT16: return bfloat_value(((const uint16_t *)x)[i]);
  case LIFL_INT8: return ((const int8_t *)x)[i];
  case LIFL_INT16: return ((const int16_t *)x)[i];
  case LIFL_INT32: return ((const int32_t *)x)[i];
  case LIFL_INT64: return (double)((const int64_t *)x)[i];
  case LIFL_UINT8: return ((const uint8_t *)x)[i];
  default: return ((const uint8_t *)x)[i] != 0;
  }
}

/* Small numbers with few bits, of which every sum of a few is exact in float64 whatever the order. */
static void fill(uint32_t dtype, void *x, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) {
    uint64_t r = next_random();
    int n = (int)(r % 201) - 100;
    switch (dtype) {
    case LIFL_FLOAT32: ((float *)x)[i] = (float)n / 8; break;
    case LIFL_FLOAT64: ((double *)x)[i] = n / 8.0; break;
    case LIFL_FLOAT16: ((uint16_t *)x)[i] = (uint16_t)(r % 0x5000 | (r >> 17 & 1) << 15); break;
    case LIFL_BFLOAT16: ((uint16_t *)x)[i] = (uint16_t)((0x3c00 + r % 0x700) | (r >> 17 & 1) << 15); break;
    case LIFL_INT8: ((int8_t *)x)[i] = (int8_t)n; break;
    case LIFL_INT16: ((int16_t *)x)[i] = (int16_t)(n * 300); break;
    case LIFL_INT32: ((int32_t *)x)[i] = n * 1000003; break;
    case LIFL_INT64: ((int64_t *)x)[i] = n * INT64_C(1000000007); break;
    case LIFL_UINT8: ((uint8_t *)x)[i] = (uint8_t)r; break;
    default: ((uint8_t *)x)[i] = r & 1; break;
    }
  }
}

static void test_fold_and_finish_against_naive_loops(void) {
  for (uint32_t dtype = LIFL_FLOAT32; dtype <= LIFL_BOOL; dtype++) {
    uint64_t size = lifl_dtype_bytes(dtype), wide = lifl_sum_bytes(dtype);
    void *updates[UPDATES], *first = malloc(MOST * wide), *second = malloc(MOST * wide), *mean = malloc(MOST * size);
    double weights[UPDATES], total = 0;
    for (int k = 0; k < UPDATES; k++) {
      fill(dtype, updates[k] = malloc(MOST * size), MOST);
      total += weights[k] = 1 + k % 3;
    }
    for (int c = 0; c < NUM_COUNTS; c++) {
      uint64_t count = COUNTS[c];
      for (uint32_t split = 1; split < UPDATES; split++) {
        /* In two batches, the second on top of the first; then in two sums that the top adds up. */
        const void *const *all = (const void *const *)updates;
        CHECK(lifl_fold(dtype, first, NULL, all, weights, split, count) == LIFL_OK);
        CHECK(lifl_fold(dtype, second, first, all + split, weights + split, UPDATES - split, count) == LIFL_OK);
        for (int tree = 0; tree < 2; tree++) {
          const void *sums[] = {second, first};
          if (tree) CHECK(lifl_fold(dtype, second, NULL, all + split, weights + split, UPDATES - split, count) == LIFL_OK);
          CHECK(lifl_finish(dtype, mean, sums, 1 + (uint32_t)tree, NULL, NULL, 0, total, 0, count) == LIFL_OK);
          for (uint64_t i = 0; i < count; i++) {
            double sum = 0, got = value_of(dtype, mean, i), expected;
            for (int k = 0; k < UPDATES; k++) sum += weights[k] * value_of(dtype, updates[k], i);
            expected = sum / total;
            double ulp = fabs(expected);
            if (dtype == LIFL_FLOAT32) ulp = fabs(expected - (double)(float)expected);
            else if (dtype == LIFL_FLOAT64) ulp = 0;
            else if (dtype == LIFL_FLOAT16) ulp = fmax(ulp * 0x1p-11, 0x1p-25);
            else if (dtype == LIFL_BFLOAT16) ulp *= 0x1p-8;
            else if (dtype == LIFL_BOOL) ulp = 0.5;
            else ulp = fabs(expected - rint(expected));
            CHECK(fabs(got - expected) <= ulp * (1 + 1e-9));
          }
        }
      }
    }
    for (int k = 0; k < UPDATES; k++) free(updates[k]);
    free(first);
    free(second);
    free(mean);
  }
}

static void test_fold_writes_only_its_elements(void) {
  for (uint32_t dtype = LIFL_FLOAT32; dtype <= LIFL_BOOL; dtype++)
    for (int c = 0; c < NUM_COUNTS; c++) {
      /* Exactly as long as it must be: the address sanitizer sees one byte more, read or written. */
      uint64_t n = COUNTS[c], size = lifl_dtype_bytes(dtype), wide = lifl_sum_bytes(dtype);
      void *x = malloc(n * size + !n), *sum = malloc(n * wide + !n), *mean = malloc(n * size + !n);
      void *wide_mean = malloc(n * 8 + !n);
      const void *xs[] = {x, x, x}, *sums[] = {sum};
      double ones[] = {1, 1, 1}, thirds[] = {0.5, 0.25, 0.25};
      fill(dtype, x, n);
      CHECK(lifl_copy_finite(dtype, mean, x, n) == -1 && memcmp(mean, x, n * size) == 0);
      CHECK(lifl_fold(dtype, sum, NULL, xs, ones, 3, n) == LIFL_OK);
      CHECK(lifl_finish(dtype, mean, sums, 1, NULL, NULL, 0, 3, 0, n) == LIFL_OK && memcmp(mean, x, n * size) == 0);
      CHECK(lifl_flower(dtype, wide_mean, xs, thirds, 3, n) == (dtype == LIFL_BFLOAT16 ? LIFL_EINVAL : LIFL_OK));
      free(x);
      free(sum);
      free(mean);
      free(wide_mean);
    }
}

static void test_kernels_refuse_nonsense(void) {
  double sum[2] = {0, 0}, other[2], weights[] = {1};
  const void *xs[] = {sum};
  CHECK(lifl_fold(10, other, NULL, xs, weights, 1, 1) == LIFL_EINVAL);
  CHECK(lifl_fold(LIFL_FLOAT64, sum, sum, xs, weights, 1, 1) == LIFL_EINVAL);
  CHECK(lifl_fold(LIFL_FLOAT64, other, NULL, xs, weights, 0, 1) == LIFL_EINVAL);
  CHECK(lifl_finish(10, other, xs, 1, NULL, NULL, 0, 1, 0, 1) == LIFL_EINVAL && lifl_finish(LIFL_FLOAT64, other, xs, 0, NULL, NULL, 0, 1, 0, 1) == LIFL_EINVAL);
  CHECK(lifl_finish(LIFL_FLOAT64, other, xs, 1, NULL, NULL, 0, 0, 0, 1) == LIFL_EINVAL);
  CHECK(lifl_finish(LIFL_FLOAT64, other, xs, 1, NULL, NULL, 0, NAN, 0, 1) == LIFL_EINVAL);
  CHECK(lifl_flower(LIFL_FLOAT64, other, xs, weights, 0, 1) == LIFL_EINVAL);
  CHECK(lifl_copy_finite(10, other, sum, 1) == -2);
}

static void test_overflow_is_told(void) {
  double sum[3] = {1, INFINITY, 2}, mean[3];
  float narrow[3];
  const void *sums[] = {sum};
  CHECK(lifl_finish(LIFL_FLOAT64, mean, sums, 1, NULL, NULL, 0, 1, 0, 3) == LIFL_OVERFLOW);
  CHECK(lifl_finish(LIFL_FLOAT32, narrow, sums, 1, NULL, NULL, 0, 1, 0, 3) == LIFL_OVERFLOW);
  CHECK(lifl_finish(LIFL_FLOAT64, mean, sums, 1, NULL, NULL, 0, 1, 0, 1) == LIFL_OK);
  sum[1] = NAN;
  CHECK(lifl_finish(LIFL_FLOAT32, narrow, sums, 1, NULL, NULL, 0, 1, 0, 3) == LIFL_OVERFLOW);
}

static void test_int64_is_exact(void) {
  int64_t x[] = {INT64_C(4611686018427387905), INT64_C(-4611686018427387907), INT64_C(9007199254740993), INT64_MIN, 0};
  double sum[10], weights[] = {3, 4, 1000003};
  int64_t mean[5];
  const void *xs[] = {x, x, x}, *sums[] = {sum};
  CHECK(lifl_fold(LIFL_INT64, sum, NULL, xs, weights, 3, 5) == LIFL_OK);
  CHECK(lifl_finish(LIFL_INT64, mean, sums, 1, NULL, NULL, 0, 1000010, 0, 5) == LIFL_OK);
  for (int i = 0; i < 5; i++) CHECK(mean[i] == x[i]);
  int64_t a[] = {1, 2, -1, -2, INT64_C(9007199254740993)}, b[] = {0, 1, 0, -1, INT64_C(9007199254740994)};
  int64_t even[] = {0, 2, 0, -2, INT64_C(9007199254740994)};
  const void *two[] = {a, b};
  double ones[] = {1, 1};
  CHECK(lifl_fold(LIFL_INT64, sum, NULL, two, ones, 2, 5) == LIFL_OK);
  CHECK(lifl_finish(LIFL_INT64, mean, sums, 1, NULL, NULL, 0, 2, 0, 5) == LIFL_OK);
  for (int i = 0; i < 5; i++) CHECK(mean[i] == even[i]);
}

static void test_first_nonfinite_is_found(void) {
  struct {
    uint32_t dtype;
    uint64_t bits[3];
  } rows[] = {{LIFL_FLOAT32, {0x7f800000, 0xff800000, 0x7f800001}},
              {LIFL_FLOAT64, {0x7ff0000000000000, 0xfff0000000000000, 0x7ff0000000000001}},
              {LIFL_FLOAT16, {0x7c00, 0xfc00, 0x7c01}},
              {LIFL_BFLOAT16, {0x7f80, 0xff80, 0xffff}}};
  for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
    uint64_t size = lifl_dtype_bytes(rows[r].dtype), most = 40000;
    uint8_t *x = calloc(most, size), *y = malloc(most * size);
    for (int c = 1; c < NUM_COUNTS + 1; c++) {
      uint64_t count = c < NUM_COUNTS ? COUNTS[c] : most;
      uint64_t places[] = {0, count / 2, count - 1, 32768 / size < count ? 32768 / size : 0};
      for (int p = 0; p < 4; p++)
        for (int k = 0; k < 3; k++) {
          memcpy(x + places[p] * size, &rows[r].bits[k], size);
          memcpy(x + (count - 1) * size, &rows[r].bits[0], size); /* a second one, later or the same */
          CHECK(lifl_copy_finite(rows[r].dtype, y, x, count) == (int64_t)places[p]);
          CHECK(lifl_copy_finite(rows[r].dtype, x, x, count) == (int64_t)places[p]);
          memset(x + places[p] * size, 0, size);
          memset(x + (count - 1) * size, 0, size);
          CHECK(lifl_copy_finite(rows[r].dtype, y, x, count) == -1);
        }
    }
    free(x);
    free(y);
  }
  /* The same bits are ordinary integers; and the largest finite numbers are finite. */
  int32_t n = 0x7f800000, m = 0;
  CHECK(lifl_copy_finite(LIFL_INT32, &m, &n, 1) == -1 && m == n);
  uint16_t largest[] = {0x7bff, 0xfbff, 0x7f7f}, copy[3];
  CHECK(lifl_copy_finite(LIFL_FLOAT16, copy, largest, 2) == -1);
  CHECK(lifl_copy_finite(LIFL_BFLOAT16, copy, largest + 2, 1) == -1);
}

static void test_copy_takes_any_address(void) {
  uint8_t raw[8 * 100 + 1];
  double target[100];
  for (int i = 0; i < 100; i++) memcpy(raw + 1 + 8 * i, &(double){i}, 8);
  CHECK(lifl_copy_finite(LIFL_FLOAT64, target, raw + 1, 100) == -1);
  for (int i = 0; i < 100; i++) CHECK(target[i] == i);
}

int main(void) {
  test_create_and_attach();
  test_senseless_arguments();
  test_corrupt_header();
  test_alloc_until_full();
  test_fragmented_block_is_one_run();
  test_stale_moves_fail();
  test_each_block_is_taken_once();
  test_ring_is_full_at_its_capacity();
  test_credits_bound_what_is_on_its_way();
  test_credits_of_the_dead_come_back();
  test_link_sends_and_pops();
  test_ring_between_processes();
  test_no_wake_up_is_lost();
  test_eventfd_rings_when_armed();
  test_wait_returns_at_its_time();
  test_fold_and_finish_against_naive_loops();
  test_fold_writes_only_its_elements();
  test_kernels_refuse_nonsense();
  test_overflow_is_told();
  test_int64_is_exact();
  test_first_nonfinite_is_found();
  test_copy_takes_any_address();
  printf("all passed on %s\n", lifl_vector_width());
  return 0;
}
