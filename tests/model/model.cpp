// The rings, the wake-ups and the ownership words of lifl/_shm.c (translated into core.inc) under relacy: each
// thread is a process with a handle of its own; every interleaving and every value that the memory model allows
// to a load may occur. A data race, a failed assertion and a sleep without end are found.
#include <relacy/relacy.hpp>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <unistd.h>

#include "_shm.h"

// relacy's own names for them, for other programs than this.
#undef futex
#undef FUTEX_WAIT
#undef FUTEX_WAKE

#define RING_SLOTS 2u
#define UNIT_BYTES 64u
#define NONE UINT32_MAX
#define FUTEX_WAIT 0
#define FUTEX_WAKE 1
#define STEP() ((void)0)
#define memory_order_relaxed rl::mo_relaxed
#define memory_order_acquire rl::mo_acquire
#define memory_order_release rl::mo_release
#define memory_order_acq_rel rl::mo_acq_rel
#define memory_order_seq_cst rl::mo_seq_cst
#define atomic_load_explicit(p, o) ((*(p))($).load(o))
#define atomic_store_explicit(p, v, o) ((*(p))($).store(v, o))
#define atomic_exchange_explicit(p, v, o) ((*(p))($).exchange(v, o))
#define atomic_compare_exchange_strong_explicit(p, e, v, s, f) ((*(p))($).compare_exchange_strong(*(e), v, s, f))
#define atomic_thread_fence(o) rl::atomic_thread_fence(o, $)

// The kernel's part of a sleep, for one consumer: a futex, and an eventfd.
struct Kernel {
  rl::mutex lock;
  rl::condition_variable wake;
  rl::var<int> rung;
};
static Kernel *kernel;

static long futex(rl::atomic<uint32_t> *word, int op, uint32_t value, const struct timespec *) {
  kernel->lock.lock($);
  if (op == FUTEX_WAKE) {
    kernel->wake.notify_one($);
  } else if ((*word)($).load(rl::mo_relaxed) == value) {
    kernel->wake.wait(kernel->lock, $); // no time-out: a lost wake-up is a sleep without end
  }
  kernel->lock.unlock($);
  return 0;
}

static long write(int, const void *, size_t n) { // to the eventfd
  kernel->lock.lock($);
  kernel->rung($) = 1;
  kernel->wake.notify_one($);
  kernel->lock.unlock($);
  return (long)n;
}

static void wait_for_eventfd() {
  kernel->lock.lock($);
  while (!(int)kernel->rung($)) kernel->wake.wait(kernel->lock, $);
  kernel->rung($) = 0;
  kernel->lock.unlock($);
}

uint64_t lifl_now_ns(void) { return 0; } // no spin is modelled, so no clock

static void relax() { rl::yield(1, $); }

// A descriptor as relacy wants a variable's value: printable, and with a value before the first write.
struct Slot : lifl_desc {
  Slot(int = 0) : lifl_desc() {}
  Slot(const lifl_desc &d) : lifl_desc(d) {}
};
static std::ostream &operator<<(std::ostream &s, const Slot &d) { return s << d.block; }

#include "core.inc"

enum { PRODUCER = 0, CONSUMER = 1, P = 2 };

template <typename Suite, int threads> struct Shared : rl::test_suite<Suite, threads> {
  struct ring rings[P * P];
  struct peer peers[P];
  struct entry table[2];
  Kernel sleep;
  lifl_arena handle[threads];
  struct end produced[threads][P * P], consumed[threads][P * P];
  int eventfds[threads][P];
  uint32_t scan[threads][P];
  uint64_t spin_ns[threads][P], used[1];

  void before() {
    kernel = &sleep;
    sleep.rung($) = 0;
    used[0] = 3;
    for (auto &r : rings) r.head($).store(0, rl::mo_relaxed), r.tail($).store(0, rl::mo_relaxed);
    for (auto &p : peers) p.parked($).store(AWAKE, rl::mo_relaxed);
    for (auto &e : table) {
      e.word($).store(pack(7, 0, LIFL_WRITING), rl::mo_relaxed);
      e.units = 1, e.next = NONE, e.nbytes = 1;
    }
    for (int t = 0; t < threads; t++) {
      lifl_arena *a = &handle[t];
      memset((void *)a, 0, sizeof *a);
      a->h.participants = P, a->h.units = 2;
      a->rings = rings, a->peers = peers, a->table = table;
      memset(produced[t], 0, sizeof produced[t]), memset(consumed[t], 0, sizeof consumed[t]);
      memset(scan[t], 0, sizeof scan[t]), memset(spin_ns[t], 0, sizeof spin_ns[t]);
      for (int &fd : eventfds[t]) fd = 9;
      a->produced = produced[t], a->consumed = consumed[t], a->eventfds = eventfds[t];
      a->scan = scan[t], a->spin_ns = spin_ns[t], a->used = t == 0 ? used : nullptr;
    }
  }
};

// In order, none lost, none twice, over a full ring and an empty one; what was written before is seen after.
struct Ring : Shared<Ring, 2> {
  static const uint32_t N = 5;
  rl::var<int> payload[N];

  void thread(unsigned me) {
    if (me == PRODUCER) {
      for (uint32_t i = 0; i < N;) {
        lifl_desc d = {i, 0, 0, 0, 0};
        payload[i]($) = (int)i + 100;
        int status;
        while ((status = lifl_ring_push(&handle[me], PRODUCER, CONSUMER, &d)) == LIFL_FULL) rl::yield(1, $);
        RL_ASSERT(status == LIFL_OK);
        i++;
      }
    } else {
      for (uint32_t i = 0; i < N;) {
        lifl_desc d;
        uint32_t from;
        if (lifl_inbox_pop(&handle[me], CONSUMER, &d, &from) == LIFL_EMPTY) {
          rl::yield(1, $);
          continue;
        }
        RL_ASSERT(from == PRODUCER && d.block == i);
        RL_ASSERT((int)payload[i]($) == (int)i + 100);
        i++;
      }
    }
  }
};

// Nobody sleeps on a ring that has something in it: neither on the futex nor on the eventfd.
template <typename Suite, bool on_eventfd> struct Park : Shared<Suite, 2> {
  static const uint32_t N = 2;

  void thread(unsigned me) {
    lifl_arena *a = &this->handle[me];
    if (me == PRODUCER) {
      for (uint32_t i = 0; i < N; i++) {
        lifl_desc d = {i, 0, 0, 0, 0};
        while (lifl_ring_push(a, PRODUCER, CONSUMER, &d) == LIFL_FULL) rl::yield(1, $);
      }
      return;
    }
    for (uint32_t i = 0; i < N;) {
      lifl_desc d;
      uint32_t from;
      if (lifl_inbox_pop(a, CONSUMER, &d, &from) == LIFL_OK) {
        RL_ASSERT(d.block == i);
        i++;
      } else if (!on_eventfd) {
        lifl_inbox_wait(a, CONSUMER, 0, 1);
      } else if (lifl_inbox_arm(a, CONSUMER) == LIFL_EMPTY) {
        wait_for_eventfd();
      }
    }
  }
};
struct ParkFutex : Park<ParkFutex, false> {};
struct ParkEventfd : Park<ParkEventfd, true> {};

// A READY block goes to exactly one of two who want it, with what was written to it; when it is free again it is
// written anew, and who has an old name of it gets nothing.
struct Word : Shared<Word, 3> {
  rl::var<int> bytes;
  rl::var<int> takers[3];

  void before() {
    Shared<Word, 3>::before();
    for (auto &t : takers) t($) = 0;
  }

  void thread(unsigned me) {
    lifl_arena *a = &handle[me];
    if (me == 0) {
      bytes($) = 41;
      RL_ASSERT(lifl_block_move(a, 0, 7, 0, LIFL_WRITING, 1, LIFL_READY) == LIFL_OK);
      while (lifl_block_reclaim(a, 0, 7, 0) != LIFL_OK) rl::yield(1, $);
      bytes($) = 42; // it is mine again: nobody reads any more
      RL_ASSERT(lifl_block_reclaim(a, 0, 7, 0) == LIFL_STALE && !is_generation(a, 0, 7));
      return;
    }
    for (int tries = 0; tries < 2; tries++) {
      if (lifl_block_move(a, 0, 7, 1, LIFL_READY, 1, LIFL_READING) != LIFL_OK) continue;
      takers[me]($) = 1;
      RL_ASSERT((int)bytes($) == 41);
      RL_ASSERT(lifl_block_move(a, 0, 7, 1, LIFL_READING, 0, LIFL_FREE) == LIFL_OK);
      return;
    }
    if (me == 2) // the one who gave up may not have been alone: somebody has to free it
      while (lifl_block_move(a, 0, 7, 1, LIFL_READY, 0, LIFL_FREE) != LIFL_OK) {
        if (word_generation(a->table[0].word($).load(rl::mo_acquire)) != 7 ||
            word_state(a->table[0].word($).load(rl::mo_acquire)) == LIFL_FREE)
          return;
        rl::yield(1, $);
      }
  }

  void after() { RL_ASSERT((int)takers[1]($) + (int)takers[2]($) <= 1); }
};

// A consumer died; its producer empties the ring, and the successor begins where that says.
struct Reset : Shared<Reset, 2> {
  rl::atomic<int> is_dead;

  void before() {
    Shared<Reset, 2>::before();
    is_dead($).store(0, rl::mo_relaxed);
  }

  void thread(unsigned me) {
    lifl_arena *a = &handle[me];
    lifl_desc d = {0, 0, 0, 0, 0};
    if (me == PRODUCER) {
      for (uint32_t i = 0; i < 2; i++) d.block = i, lifl_ring_push(a, PRODUCER, CONSUMER, &d);
      while (!is_dead($).load(rl::mo_acquire)) rl::yield(1, $);
      RL_ASSERT(lifl_ring_reset(a, PRODUCER, CONSUMER) == LIFL_OK);
      d.block = 9;
      RL_ASSERT(lifl_ring_push(a, PRODUCER, CONSUMER, &d) == LIFL_OK);
      is_dead($).store(2, rl::mo_release); // the successor starts after this
      return;
    }
    uint32_t from;
    lifl_inbox_pop(a, CONSUMER, &d, &from); // it may have taken one, or none
    is_dead($).store(1, rl::mo_release);
    while (is_dead($).load(rl::mo_acquire) != 2) rl::yield(1, $);
    struct ring *r = &rings[PRODUCER * P + CONSUMER];
    uint64_t head = r->head($).load(rl::mo_acquire), tail = r->tail($).load(rl::mo_acquire);
    consumed[me][PRODUCER * P + CONSUMER] = {head, tail}; // as attaching does
    RL_ASSERT(lifl_inbox_pop(a, CONSUMER, &d, &from) == LIFL_OK && d.block == 9);
    RL_ASSERT(lifl_inbox_pop(a, CONSUMER, &d, &from) == LIFL_EMPTY);
  }
};

template <typename Suite> static void check(const char *name, unsigned iterations) {
  for (int bound = 0; bound < 2; bound++) {
    rl::test_params p;
    p.iteration_count = iterations;
    p.execution_depth_limit = 4000;
    p.search_type = bound ? rl::fair_context_bound_scheduler_type : rl::random_scheduler_type;
    p.context_bound = 2;
    std::ostringstream said;
    p.output_stream = p.progress_stream = &said;
    bool passed = rl::simulate<Suite>(p);
    printf("%s, %s: %s after %lu iterations\n", name, bound ? "at most 2 switches" : "random",
           passed ? "passed" : rl::test_result_str(p.test_result), (unsigned long)p.stop_iteration);
    if (!passed) exit(1);
  }
}

int main(int argc, char **argv) {
  unsigned n = argc > 1 ? (unsigned)atoi(argv[1]) : 20000;
  check<Ring>("ring", n);
  check<ParkFutex>("park on a futex", n);
  check<ParkEventfd>("park on an eventfd", n);
  check<Word>("ownership word", n);
  check<Reset>("ring of a dead consumer", n);
  return 0;
}
