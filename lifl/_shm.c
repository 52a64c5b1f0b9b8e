/* lifl's C core: the arena, its ownership words, the rings, the wake-ups. _fold.c has the fold kernels. There is no
 * Python.h: the tests under tests/c link this file alone.
 *
 *   offset 0          header_bytes            blocks_offset                       total_bytes
 *   +--------+--------+---------+-------------+----------+----------+-----+-------+
 *   | header | peers  | rings   | block table | unit 0   | unit 1   | ... |       |
 *   | 4096 B | P x 64 | P*P     | N x 64      | 64 KiB   | 64 KiB   |     |       |
 *   +--------+--------+---------+-------------+----------+----------+-----+-------+
 *
 * A block is a chain of extents, each a run of units; its name is its first unit. Nearly always a block is one run.
 * When no run is long enough the block takes several, and lifl_block_map lays them side by side in virtual memory. An
 * allocation therefore succeeds exactly if enough units are free, and the waste of a block is under one unit. That
 * replaces size classes.
 *
 * Shared memory holds offsets, never pointers. A value that another process may have written is read once into a local,
 * checked, then used. */
#define _GNU_SOURCE
#include "_shm.h"
#include "_steps.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x314d48534c46494cULL /* "LIFLSHM1" */
#define VERSION 1u
#define UNIT_BYTES 65536u /* a multiple of every page size Linux has */
#define MANIFEST_BYTES 4096u
#define RING_SLOTS 256u /* a power of two */
#define NONE UINT32_MAX
#define MAX_PARTICIPANTS 1024u
#define HEADER_BYTES 4096u
#define LINE 64

_Static_assert(sizeof(lifl_desc) == 16, "a descriptor is 16 bytes");
_Static_assert(sizeof(lifl_manifest) <= MANIFEST_BYTES, "the manifest fits before its sum");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "shared words are lock-free");

struct header { /* [const after init] */
  uint64_t magic;
  uint32_t version;
  uint32_t participants;
  uint64_t total_bytes;
  uint64_t node_id;
  uint32_t units;
  uint32_t unit_bytes;
  uint32_t ring_slots;
  uint32_t reserved;
  uint64_t rings_offset;
  uint64_t table_offset;
  uint64_t blocks_offset;
};

/* The consumer sets PARKED_FUTEX or PARKED_EVENTFD before it sleeps. The producer that resets the word to AWAKE must
 * wake it. */
enum { AWAKE = 0, PARKED_FUTEX = 1, PARKED_EVENTFD = 2 };

struct peer {
  alignas(LINE) _Atomic uint32_t parked; /* [consumer] sets, [producer] resets */
};

struct ring {
  alignas(LINE) _Atomic uint64_t head; /* [consumer] descriptors taken, free-running */
  alignas(LINE) _Atomic uint64_t tail; /* [producer] descriptors given, free-running */
  alignas(LINE) lifl_desc slots[RING_SLOTS];
};

struct entry { /* one for each unit; the entry of a block's first unit is that of the block */
  alignas(LINE) _Atomic uint64_t word; /* [block's owner] generation:32 owner:16 state:16, by compare-and-swap */
  uint32_t units;                      /* [arena's owner] length of the extent that begins here */
  uint32_t next;                       /* [arena's owner] first unit of the next extent, or NONE */
  uint64_t nbytes;                     /* [arena's owner] bytes of the block in use */
  lifl_note note;                      /* [block's owner] */
};
_Static_assert(sizeof(struct entry) == LINE, "one ownership word per cache line");

/* The memory of an end of a ring: its own index, and the other end's as last seen. An end looks at the other end's
 * cache line only when the ring seems full or empty. */
struct end {
  uint64_t mine;
  uint64_t cached;
};

/* The ring from one participant to another, and this process's memory of its two ends. */
struct line {
  struct ring *ring;
  struct end *produced;
  struct end *consumed;
};

struct lifl_arena {
  int fd;
  int protection; /* PROT_READ alone if the file descriptor allows no more */
  uint8_t *base;
  struct header h; /* a private copy: the shared one is not read again */
  struct peer *peers;
  struct ring *rings;
  struct entry *table;
  struct end *produced, *consumed;
  int *eventfds;
  uint64_t *spin_ns; /* for each consumer: the present length of the adaptive spin */
  uint32_t *scan;    /* for each consumer: the producer at which its next scan begins */
  uint64_t *used;    /* the allocator's bitmap; only in the arena's owner */
  uint32_t free_units;
};

uint64_t lifl_unit_bytes(void) { return UNIT_BYTES; }
uint64_t lifl_manifest_bytes(void) { return MANIFEST_BYTES; }
uint32_t lifl_none(void) { return NONE; }
uint32_t lifl_batch_max(void) { return sizeof(((lifl_manifest *)0)->blocks) / sizeof(uint32_t); }

uint64_t lifl_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---------------------------------------------------------------- arena */

static uint64_t align_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static void layout(struct header *h) {
  uint64_t p = h->participants;
  h->rings_offset = HEADER_BYTES + align_up(p * sizeof(struct peer), LINE);
  h->table_offset = align_up(h->rings_offset + p * p * sizeof(struct ring), 4096);
  h->blocks_offset = align_up(h->table_offset + (uint64_t)h->units * sizeof(struct entry), UNIT_BYTES);
  h->total_bytes = h->blocks_offset + (uint64_t)h->units * UNIT_BYTES;
}

void lifl_arena_detach(lifl_arena *a) {
  if (!a) return;
  int saved = errno;
  if (a->base) munmap(a->base, a->h.total_bytes);
  if (a->fd >= 0) close(a->fd);
  free(a->produced);
  free(a->consumed);
  free(a->eventfds);
  free(a->spin_ns);
  free(a->scan);
  free(a->used);
  free(a);
  errno = saved;
}

/* Takes ownership of fd; on failure it undoes everything and keeps errno. */
static int open_handle(int fd, const struct header *h, lifl_arena **out) {
  lifl_arena *a = calloc(1, sizeof *a);
  if (!a) {
    close(fd);
    return LIFL_ESYS;
  }
  a->fd = fd;
  a->h = *h;
  uint64_t p = h->participants;
  a->produced = calloc(p * p, sizeof *a->produced);
  a->consumed = calloc(p * p, sizeof *a->consumed);
  a->eventfds = malloc(p * sizeof *a->eventfds);
  a->spin_ns = calloc(p, sizeof *a->spin_ns);
  a->scan = calloc(p, sizeof *a->scan);
  if (!a->produced || !a->consumed || !a->eventfds || !a->spin_ns || !a->scan) goto fail;
  for (uint64_t i = 0; i < p; i++) a->eventfds[i] = -1;
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0) goto fail;
  a->protection = (flags & O_ACCMODE) == O_RDONLY ? PROT_READ : PROT_READ | PROT_WRITE;
  void *base = mmap(NULL, h->total_bytes, a->protection, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) goto fail;
  a->base = base;
  a->peers = (struct peer *)(a->base + HEADER_BYTES);
  a->rings = (struct ring *)(a->base + h->rings_offset);
  a->table = (struct entry *)(a->base + h->table_offset);
  /* A process that takes over an end continues at the shared index of its predecessor. */
  for (uint64_t i = 0; i < p * p; i++) {
    uint64_t head = atomic_load_explicit(&a->rings[i].head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&a->rings[i].tail, memory_order_acquire);
    a->produced[i] = (struct end){tail, head};
    a->consumed[i] = (struct end){head, tail};
  }
  *out = a;
  return LIFL_OK;
fail:
  lifl_arena_detach(a);
  return LIFL_ESYS;
}

int lifl_arena_create(uint64_t payload_bytes, uint32_t participants, uint64_t node_id, lifl_arena **out) {
  uint64_t units = (payload_bytes + UNIT_BYTES - 1) / UNIT_BYTES;
  if (units == 0 || units >= NONE || participants == 0 || participants > MAX_PARTICIPANTS) return LIFL_EINVAL;
  struct header h = {.magic = MAGIC,
                     .version = VERSION,
                     .participants = participants,
                     .node_id = node_id,
                     .units = (uint32_t)units,
                     .unit_bytes = UNIT_BYTES,
                     .ring_slots = RING_SLOTS};
  layout(&h);
  int fd = memfd_create("lifl", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return LIFL_ESYS;
  /* The memory is taken now: ftruncate alone would succeed on a full machine, and the first use of a page would be a
   * SIGBUS in the middle of a round. */
  int error = posix_fallocate(fd, 0, (off_t)h.total_bytes);
  if (!error && pwrite(fd, &h, sizeof h, 0) != (ssize_t)sizeof h) error = errno ? errno : EIO;
  if (!error && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) error = errno;
  if (error) {
    close(fd);
    errno = error;
    return LIFL_ESYS;
  }
  int status = open_handle(fd, &h, out);
  if (status) return status;
  lifl_arena *a = *out;
  a->used = calloc((units + 63) / 64, sizeof *a->used);
  if (!a->used) {
    lifl_arena_detach(a);
    return LIFL_ESYS;
  }
  a->free_units = h.units;
  return LIFL_OK;
}

int lifl_arena_attach(int fd, lifl_arena **out) {
  struct header h, expected;
  struct stat st;
  if (fstat(fd, &st) < 0) return LIFL_ESYS;
  if (pread(fd, &h, sizeof h, 0) != (ssize_t)sizeof h) return LIFL_ECORRUPT;
  if (h.magic != MAGIC || h.version != VERSION || h.unit_bytes != UNIT_BYTES || h.ring_slots != RING_SLOTS ||
      h.participants == 0 || h.participants > MAX_PARTICIPANTS || h.units == 0 || h.units == NONE)
    return LIFL_ECORRUPT;
  expected = h;
  layout(&expected);
  if (memcmp(&h, &expected, sizeof h) != 0 || (uint64_t)st.st_size != h.total_bytes) return LIFL_ECORRUPT;
  int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) return LIFL_ESYS;
  return open_handle(own, &h, out);
}

int lifl_arena_fd(const lifl_arena *a) { return a->fd; }
uint32_t lifl_arena_units(const lifl_arena *a) { return a->h.units; }
uint32_t lifl_arena_free_units(const lifl_arena *a) { return a->free_units; }
uint32_t lifl_arena_participants(const lifl_arena *a) { return a->h.participants; }
uint64_t lifl_arena_node_id(const lifl_arena *a) { return a->h.node_id; }
uint64_t lifl_arena_total_bytes(const lifl_arena *a) { return a->h.total_bytes; }

/* ---------------------------------------------------------------- blocks */

static uint64_t pack(uint32_t generation, uint32_t owner, uint32_t state) {
  return (uint64_t)generation << 32 | (uint64_t)(owner & 0xffff) << 16 | (state & 0xffff);
}
static uint32_t word_generation(uint64_t w) { return (uint32_t)(w >> 32); }
static uint32_t word_owner(uint64_t w) { return (uint32_t)(w >> 16) & 0xffff; }
static uint32_t word_state(uint64_t w) { return (uint32_t)w & 0xffff; }

static bool bit(const uint64_t *map, uint32_t i) { return map[i / 64] >> (i % 64) & 1; }

static void mark(lifl_arena *a, uint32_t first, uint32_t n, bool used) {
  for (uint32_t i = first; i < first + n; i++) {
    uint64_t mask = 1ull << (i % 64);
    a->used[i / 64] = used ? a->used[i / 64] | mask : a->used[i / 64] & ~mask;
  }
  if (used) a->free_units -= n;
  else a->free_units += n;
}

/* The next run of free units at or after `from`: its first unit, or NONE, and its length, counted up to `most`. */
static uint32_t next_run(const lifl_arena *a, uint32_t from, uint32_t most, uint32_t *length) {
  uint32_t n = a->h.units, i = from;
  while (i < n && bit(a->used, i)) i += (i % 64 == 0 && a->used[i / 64] == UINT64_MAX) ? 64 : 1;
  if (i >= n) return NONE;
  uint32_t first = i;
  while (i < n && i - first < most && !bit(a->used, i)) i++;
  *length = i - first;
  return first;
}

static uint32_t find_run(const lifl_arena *a, uint32_t units) {
  uint32_t length = 0;
  for (uint32_t i = next_run(a, 0, units, &length); i != NONE; i = next_run(a, i + length, units, &length))
    if (length == units) return i;
  return NONE;
}

/* The first unit of the last run of `units` free units, or NONE. */
static uint32_t find_last_run(const lifl_arena *a, uint32_t units) {
  uint32_t free = 0;
  for (uint32_t i = a->h.units; i-- > 0;) {
    free = bit(a->used, i) ? 0 : free + 1;
    if (free == units) return i;
  }
  return NONE;
}

static int allocate(lifl_arena *a, uint64_t nbytes, uint32_t owner, uint32_t state, uint32_t *block,
                    uint32_t *generation, uint32_t (*find)(const lifl_arena *, uint32_t)) {
  if (!a->used || owner >= a->h.participants) return LIFL_EINVAL;
  if (nbytes > (uint64_t)a->free_units * UNIT_BYTES) return LIFL_FULL;
  uint64_t wanted = nbytes ? (nbytes + UNIT_BYTES - 1) / UNIT_BYTES : 1;
  if (wanted > a->free_units) return LIFL_FULL;
  uint32_t units = (uint32_t)wanted, head = NONE;
  /* First fit: units that were used before are used again, because their pages are mapped in every process that used
   * them. The first use of a page by a process is a fault of some microseconds, and an update of 47 MB has eleven
   * thousand pages. */
  uint32_t run = find(a, units);
  if (run != NONE) {
    mark(a, run, units, true);
    a->table[run].units = units;
    a->table[run].next = NONE;
    head = run;
  } else {
    uint32_t last = NONE, length = 0, from = 0;
    while (units) {
      uint32_t first = next_run(a, from, units, &length);
      if (first == NONE) return LIFL_ECORRUPT; /* free_units promised them; the marked ones stay out of use */
      mark(a, first, length, true);
      a->table[first].units = length;
      a->table[first].next = NONE;
      if (last == NONE) head = first;
      else a->table[last].next = first;
      last = first;
      units -= length;
      from = first + length;
    }
  }
  struct entry *e = &a->table[head];
  STEP();
  e->nbytes = nbytes;
  memset(&e->note, 0, sizeof e->note);
  uint32_t g = word_generation(atomic_load_explicit(&e->word, memory_order_relaxed)) + 1;
  /* SYNC: block-word. Release: a process that sees the new generation sees the extents and the size. */
  STEP();
  atomic_store_explicit(&e->word, pack(g, owner, state), memory_order_release);
  STEP();
  *block = head;
  *generation = g;
  return LIFL_OK;
}

int lifl_block_alloc(lifl_arena *a, uint64_t nbytes, uint32_t owner, uint32_t state, uint32_t *block,
                     uint32_t *generation) {
  return allocate(a, nbytes, owner, state, block, generation, find_run);
}

/* Allocates at the other end of the arena, for a block that is reserved and may never be written: the low units, whose
 * pages are mapped, stay free for blocks that are. */
int lifl_block_reserve(lifl_arena *a, uint64_t nbytes, uint32_t owner, uint32_t state, uint32_t *block,
                       uint32_t *generation) {
  return allocate(a, nbytes, owner, state, block, generation, find_last_run);
}

static bool is_generation(lifl_arena *a, uint32_t block, uint32_t generation) {
  /* SYNC: block-word. Acquire: pairs with the release in alloc and in move. */
  return block < a->h.units &&
         word_generation(atomic_load_explicit(&a->table[block].word, memory_order_acquire)) == generation;
}

int lifl_block_reclaim(lifl_arena *a, uint32_t block, uint32_t generation, int poison) {
  if (!a->used || block >= a->h.units) return LIFL_EINVAL;
  struct entry *e = &a->table[block];
  uint64_t w = atomic_load_explicit(&e->word, memory_order_acquire);
  if (word_generation(w) != generation || !bit(a->used, block)) return LIFL_STALE;
  if (word_state(w) != LIFL_FREE && word_owner(w) != 0) return LIFL_STALE; /* a worker still uses it */
  /* SYNC: block-word. Acquire too: the last reads of the block's former owner happen before the bytes are reused. The
   * generation rises here too: this unit may soon lie in the middle of a block of another name, which a descriptor of
   * the old one must not read. */
  STEP();
  if (!atomic_compare_exchange_strong_explicit(&e->word, &w, pack(generation + 1, 0, LIFL_FREE),
                                               memory_order_acq_rel, memory_order_relaxed))
    return LIFL_STALE;
  STEP();
  for (uint32_t i = block; i != NONE;) {
    uint32_t n = a->table[i].units, next = a->table[i].next;
    if (poison) memset(a->base + a->h.blocks_offset + (uint64_t)i * UNIT_BYTES, 0xa5, (uint64_t)n * UNIT_BYTES);
    mark(a, i, n, false);
    i = next;
  }
  return LIFL_OK;
}

int lifl_block_move(lifl_arena *a, uint32_t block, uint32_t generation, uint32_t from_owner, uint32_t from_state,
                    uint32_t to_owner, uint32_t to_state) {
  if (block >= a->h.units || to_owner >= a->h.participants) return LIFL_EINVAL;
  uint64_t expected = pack(generation, from_owner, from_state);
  STEP();
  /* SYNC: block-word. The only transition: release hands over the writes of this owner, acquire takes over those of the
   * former owner. */
  bool done = atomic_compare_exchange_strong_explicit(&a->table[block].word, &expected,
                                                      pack(generation, to_owner, to_state), memory_order_acq_rel,
                                                      memory_order_relaxed);
  STEP();
  return done ? LIFL_OK : LIFL_STALE;
}

/* Walks the chain of extents without trust: it accepts at most as many extents as units, each inside the arena. */
static int extents_of(lifl_arena *a, uint32_t block, uint32_t *count, uint64_t *bytes) {
  uint64_t total = 0;
  uint32_t n = 0;
  for (uint32_t i = block; i != NONE;) {
    if (i >= a->h.units || ++n > a->h.units) return LIFL_ECORRUPT;
    uint32_t length = a->table[i].units;
    if (length == 0 || length > a->h.units - i) return LIFL_ECORRUPT;
    total += (uint64_t)length * UNIT_BYTES;
    i = a->table[i].next;
  }
  *count = n;
  *bytes = total;
  return LIFL_OK;
}

int lifl_block_read(lifl_arena *a, uint32_t block, uint32_t *generation, uint32_t *owner, uint32_t *state,
                    uint64_t *nbytes, uint32_t *extents) {
  if (block >= a->h.units) return LIFL_EINVAL;
  uint64_t w = atomic_load_explicit(&a->table[block].word, memory_order_acquire), room = 0;
  *generation = word_generation(w);
  *owner = word_owner(w);
  *state = word_state(w);
  *nbytes = a->table[block].nbytes;
  *extents = 0;
  return word_state(w) == LIFL_FREE ? LIFL_OK : extents_of(a, block, extents, &room);
}

static bool is_inside(const lifl_arena *a, const void *address) {
  return (const uint8_t *)address >= a->base && (const uint8_t *)address < a->base + a->h.total_bytes;
}

int lifl_block_map(lifl_arena *a, uint32_t block, uint32_t generation, void **address, uint64_t *nbytes) {
  if (block >= a->h.units) return LIFL_EINVAL;
  if (!is_generation(a, block, generation)) return LIFL_STALE;
  uint64_t used = a->table[block].nbytes, room = 0;
  uint32_t count = 0;
  int status = extents_of(a, block, &count, &room);
  if (status) return status;
  if (used > room) return LIFL_ECORRUPT;
  *nbytes = used;
  if (count == 1) {
    *address = a->base + a->h.blocks_offset + (uint64_t)block * UNIT_BYTES;
    return LIFL_OK;
  }
  /* Several extents are laid side by side. A PROT_NONE mapping comes first, so that no other mapping gets between. */
  uint8_t *whole = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (whole == MAP_FAILED) return LIFL_ESYS;
  uint64_t at = 0;
  for (uint32_t i = block; i != NONE; i = a->table[i].next) {
    uint64_t length = (uint64_t)a->table[i].units * UNIT_BYTES;
    if (i >= a->h.units || length > room - at) { /* changed since the check */
      munmap(whole, room);
      return LIFL_ECORRUPT;
    }
    off_t offset = (off_t)(a->h.blocks_offset + (uint64_t)i * UNIT_BYTES);
    if (mmap(whole + at, length, a->protection, MAP_SHARED | MAP_FIXED, a->fd, offset) == MAP_FAILED) {
      int saved = errno;
      munmap(whole, room);
      errno = saved;
      return LIFL_ESYS;
    }
    at += length;
  }
  *address = whole;
  return LIFL_OK;
}

int lifl_block_unmap(lifl_arena *a, void *address, uint64_t nbytes) {
  if (is_inside(a, address)) return LIFL_OK;
  return munmap(address, align_up(nbytes ? nbytes : 1, UNIT_BYTES)) ? LIFL_ESYS : LIFL_OK;
}

int lifl_block_note(lifl_arena *a, uint32_t block, lifl_note **note) {
  if (block >= a->h.units) return LIFL_EINVAL;
  *note = &a->table[block].note;
  return LIFL_OK;
}

/* ---------------------------------------------------------------- rings and wake-ups */

static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout) {
  /* A shared futex, never FUTEX_PRIVATE: a private wake-up does not reach another process. */
  return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

int lifl_peer_wake(lifl_arena *a, uint32_t consumer) {
  if (consumer >= a->h.participants) return LIFL_EINVAL;
  _Atomic uint32_t *parked = &a->peers[consumer].parked;
  /* SYNC: park. One of the two stand-alone fences: the publish before it and the look at `parked` after it must not
   * swap, else a consumer that parks in between sleeps on a full ring. */
  atomic_thread_fence(memory_order_seq_cst);
  if (atomic_load_explicit(parked, memory_order_relaxed) == AWAKE) return LIFL_OK;
  STEP();
  uint32_t was = atomic_exchange_explicit(parked, AWAKE, memory_order_acq_rel);
  STEP(); /* a process that dies here leaves the consumer asleep: every sleep is capped */
  if (was == PARKED_FUTEX) futex(parked, FUTEX_WAKE, 1, NULL);
  if (was == PARKED_EVENTFD && a->eventfds[consumer] >= 0) {
    uint64_t one = 1;
    /* EAGAIN: the counter is full, so the eventfd is readable, and no more is wanted. */
    if (write(a->eventfds[consumer], &one, sizeof one) < 0 && errno != EAGAIN) return LIFL_ESYS;
  }
  return LIFL_OK;
}

int lifl_peer_eventfd(lifl_arena *a, uint32_t consumer, int fd) {
  if (consumer >= a->h.participants) return LIFL_EINVAL;
  a->eventfds[consumer] = fd;
  return LIFL_OK;
}

static bool has_line(const lifl_arena *a, uint32_t producer, uint32_t consumer) {
  return producer < a->h.participants && consumer < a->h.participants;
}

/* The line from a producer to a consumer, which the arena must have: see has_line. */
static struct line ring_at(const lifl_arena *a, uint32_t producer, uint32_t consumer) {
  uint64_t i = (uint64_t)producer * a->h.participants + consumer;
  struct line line = {&a->rings[i], &a->produced[i], &a->consumed[i]};
  return line;
}

int lifl_ring_capacity(lifl_arena *a, uint32_t producer, uint32_t consumer) {
  return has_line(a, producer, consumer) ? (int)RING_SLOTS : LIFL_EINVAL;
}

int lifl_ring_push(lifl_arena *a, uint32_t producer, uint32_t consumer, const lifl_desc *desc) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct line line = ring_at(a, producer, consumer);
  struct ring *r = line.ring;
  struct end *end = line.produced;
  if (end->mine - end->cached >= RING_SLOTS) {
    /* SYNC: ring-head. Acquire: the consumer has read the slot that is written over next. */
    end->cached = atomic_load_explicit(&r->head, memory_order_acquire);
    if (end->mine - end->cached >= RING_SLOTS) return LIFL_FULL;
  }
  STEP();
  r->slots[end->mine % RING_SLOTS] = *desc;
  end->mine++;
  STEP();
  /* SYNC: ring-tail. Release: a consumer that sees the new tail sees the slot, and all that was written to the block
   * before. */
  atomic_store_explicit(&r->tail, end->mine, memory_order_release);
  STEP();
  return lifl_peer_wake(a, consumer);
}

int lifl_ring_pop(lifl_arena *a, uint32_t producer, uint32_t consumer, lifl_desc *desc) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct line line = ring_at(a, producer, consumer);
  struct ring *r = line.ring;
  struct end *end = line.consumed;
  if (end->mine == end->cached) {
    /* SYNC: ring-tail. Acquire: pairs with the release in push. */
    end->cached = atomic_load_explicit(&r->tail, memory_order_acquire);
    if (end->mine == end->cached) return LIFL_EMPTY;
  }
  STEP();
  *desc = r->slots[end->mine % RING_SLOTS];
  end->mine++;
  /* SYNC: ring-head. Release: the slot has been read and may be written over. */
  atomic_store_explicit(&r->head, end->mine, memory_order_release);
  STEP();
  return LIFL_OK;
}

/* Empties a ring whose consumer is proven dead; the producer calls it. */
int lifl_ring_reset(lifl_arena *a, uint32_t producer, uint32_t consumer) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct line line = ring_at(a, producer, consumer);
  struct end *end = line.produced;
  end->cached = end->mine;
  STEP();
  /* SYNC: ring-head. Release: the next consumer begins at this head. */
  atomic_store_explicit(&line.ring->head, end->mine, memory_order_release);
  return LIFL_OK;
}

/* ---------------------------------------------------------------- credits
 * Sockets take any number of descriptors, at a kilobyte of kernel memory each. The head and tail of the ring bound the
 * number on its way through a socket, as if the ring held them. */

/* Takes a credit: room for one more descriptor, and its number on this line. LIFL_FULL: there is no room. */
int lifl_credit_take(lifl_arena *a, uint32_t producer, uint32_t consumer, uint32_t *number) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct line line = ring_at(a, producer, consumer);
  struct ring *r = line.ring;
  struct end *end = line.produced;
  /* Signed: the head may be one ahead, if a number was taken, then dropped by a reset, then given back. */
  if ((int64_t)(end->mine - end->cached) >= (int64_t)RING_SLOTS) {
    /* SYNC: ring-head. Acquire, as in push, though no slot is written over here. */
    end->cached = atomic_load_explicit(&r->head, memory_order_acquire);
    if ((int64_t)(end->mine - end->cached) >= (int64_t)RING_SLOTS) return LIFL_FULL;
  }
  *number = (uint32_t)end->mine++;
  /* SYNC: ring-tail. Release, as in push: a successor of this participant begins here. */
  atomic_store_explicit(&r->tail, end->mine, memory_order_release);
  STEP();
  return LIFL_OK;
}

/* Gives back the last credit that this participant took, because the descriptor was not sent after all. */
int lifl_credit_untake(lifl_arena *a, uint32_t producer, uint32_t consumer) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct line line = ring_at(a, producer, consumer);
  struct end *end = line.produced;
  /* SYNC: ring-tail. Release, as above. */
  atomic_store_explicit(&line.ring->tail, --end->mine, memory_order_release);
  return LIFL_OK;
}

/* Raises a head, which never falls: the consumer that drains and the owner that resets may do so at the same time. */
static void raise_head(struct ring *r, uint64_t to) {
  uint64_t seen = atomic_load_explicit(&r->head, memory_order_relaxed);
  /* SYNC: ring-head. Release, as in pop. */
  while ((int64_t)(to - seen) > 0 &&
         !atomic_compare_exchange_weak_explicit(&r->head, &seen, to, memory_order_release, memory_order_relaxed)) {
  }
}

/* Gives back the credits of descriptor `number` of a line, which has been drained, and of all before it, which will not
 * come any more. A number that was never taken has no effect. */
int lifl_credit_give(lifl_arena *a, uint32_t producer, uint32_t consumer, uint32_t number) {
  if (!has_line(a, producer, consumer)) return LIFL_EINVAL;
  struct ring *r = ring_at(a, producer, consumer).ring;
  uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
  /* SYNC: ring-tail. Acquire, as in pop: the tail was raised before the descriptor was sent. */
  uint64_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
  uint64_t to = head + (number + 1 - (uint32_t)head);
  if ((int64_t)(tail - to) >= 0) raise_head(r, to);
  return LIFL_OK;
}

/* The numbers of descriptors that were ever sent to a participant and that it has taken, over either transport. */
int lifl_inbox_counts(lifl_arena *a, uint32_t consumer, uint64_t *sent, uint64_t *taken) {
  uint32_t p = a->h.participants;
  if (consumer >= p) return LIFL_EINVAL;
  *sent = *taken = 0;
  for (uint32_t from = 0; from < p; from++) {
    struct ring *r = ring_at(a, from, consumer).ring;
    uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed); /* before the tail: so not beyond it */
    uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    *taken += head;
    *sent += (int64_t)(tail - head) > 0 ? tail : head; /* a reset may put the head ahead, see lifl_credit_take */
  }
  return LIFL_OK;
}

/* Empties every line to a consumer that is proven dead: its socket is gone with all that it had not drained. */
int lifl_credit_reset(lifl_arena *a, uint32_t consumer) {
  uint32_t p = a->h.participants;
  if (consumer >= p) return LIFL_EINVAL;
  for (uint32_t from = 0; from < p; from++) {
    struct ring *r = ring_at(a, from, consumer).ring;
    raise_head(r, atomic_load_explicit(&r->tail, memory_order_acquire));
  }
  return LIFL_OK;
}

int lifl_inbox_pop(lifl_arena *a, uint32_t consumer, lifl_desc *desc, uint32_t *producer) {
  uint32_t p = a->h.participants;
  if (consumer >= p) return LIFL_EINVAL;
  /* The scan begins after the producer whose descriptor came last: no producer can starve the others. */
  for (uint32_t i = 0; i < p; i++) {
    uint32_t from = (a->scan[consumer] + i) % p;
    if (lifl_ring_pop(a, from, consumer, desc) == LIFL_OK) {
      a->scan[consumer] = (from + 1) % p;
      *producer = from;
      return LIFL_OK;
    }
  }
  return LIFL_EMPTY;
}

static bool is_ready(lifl_arena *a, uint32_t consumer) {
  uint32_t p = a->h.participants;
  for (uint32_t from = 0; from < p; from++) {
    struct line line = ring_at(a, from, consumer);
    if (atomic_load_explicit(&line.ring->tail, memory_order_acquire) != line.consumed->mine) return true;
  }
  return false;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/* Parks the consumer; true if a descriptor came meanwhile, and then the consumer is awake again. */
static bool park(lifl_arena *a, uint32_t consumer, uint32_t how) {
  _Atomic uint32_t *parked = &a->peers[consumer].parked;
  STEP();
  atomic_store_explicit(parked, how, memory_order_relaxed);
  STEP();
  /* SYNC: park. Pairs with the fence in lifl_peer_wake: either the producer sees `parked`, or this look sees its
   * descriptor. Without the fence 1,351 of 200,000 wake-ups were lost. */
  atomic_thread_fence(memory_order_seq_cst);
  if (!is_ready(a, consumer)) return false;
  atomic_store_explicit(parked, AWAKE, memory_order_relaxed);
  return true;
}

int lifl_inbox_arm(lifl_arena *a, uint32_t consumer) {
  if (consumer >= a->h.participants) return LIFL_EINVAL;
  return park(a, consumer, PARKED_EVENTFD) ? LIFL_OK : LIFL_EMPTY;
}

int lifl_inbox_wait(lifl_arena *a, uint32_t consumer, uint64_t spin_ns, uint64_t timeout_ns) {
  if (consumer >= a->h.participants) return LIFL_EINVAL;
  if (is_ready(a, consumer)) return LIFL_OK;
  if (spin_ns) {
    /* Adaptive: a spin that was answered doubles the next one, a spin in vain halves it. A busy consumer spins, and an
     * idle one soon sleeps at once. */
    uint64_t *budget = &a->spin_ns[consumer];
    uint64_t floor = spin_ns / 64 + 1;
    if (*budget < floor) *budget = floor;
    if (*budget > spin_ns) *budget = spin_ns;
    uint64_t end = lifl_now_ns() + (*budget < timeout_ns ? *budget : timeout_ns);
    do {
      for (int i = 0; i < 16; i++) {
        if (is_ready(a, consumer)) {
          *budget *= 2;
          return LIFL_OK;
        }
        relax();
      }
    } while (lifl_now_ns() < end);
    *budget /= 2;
  }
  if (timeout_ns == 0) return LIFL_TIMEOUT;
  if (park(a, consumer, PARKED_FUTEX)) return LIFL_OK;
  _Atomic uint32_t *parked = &a->peers[consumer].parked;
  struct timespec t = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
  /* The call returns at once if a producer has reset the word since. EINTR ends the wait like a time-out, so that the
   * caller can run its signal handlers. */
  futex(parked, FUTEX_WAIT, PARKED_FUTEX, &t);
  atomic_store_explicit(parked, AWAKE, memory_order_relaxed);
  return is_ready(a, consumer) ? LIFL_OK : LIFL_TIMEOUT;
}
