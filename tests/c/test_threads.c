/* The core under ThreadSanitizer: an owner and three workers as threads over one handle and one mapping, for TSan
 * does not see across processes. They hand over updates (owner -> worker -> owner), sums (worker -> worker 1 -> back),
 * and updates that the owner tries to take back while a worker tries to take them. The payload is plain memory, so
 * whatever the ownership words and rings do not order is a data race.
 *
 * TSan does not model atomic_thread_fence. The core's two fences order only the word `parked` against the tails,
 * atomics both: no plain memory depends on them, so nothing is reported falsely, and what they promise (no lost
 * wake-up) is the model check's to prove. Here a lost one shows as a time-out. */
#define _GNU_SOURCE
#include "_shm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

enum { WORKERS = 3, FLOOD = 5000, UPDATES = 30000, WORDS = 200, IN_FLIGHT = 40, SUM_EVERY = 16 };
enum { UPDATE = 1, FOLDED = 2, SUM = 3, SUM_BACK = 4, STOP = 5, NOTHING = 6 };
#define SECOND 1000000000ull
#define UNIT 65536u

static lifl_arena *arena;

static uint64_t *words_of(uint32_t block, uint32_t generation) {
  void *address;
  uint64_t nbytes;
  CHECK(lifl_block_map(arena, block, generation, &address, &nbytes) == LIFL_OK);
  CHECK(nbytes == WORDS * sizeof(uint64_t));
  return address;
}

static void push(uint32_t from, uint32_t to, uint32_t kind, uint32_t block, uint32_t generation) {
  lifl_desc d = {.block = block, .generation = generation, .kind = (uint16_t)kind};
  uint64_t begin = lifl_now_ns();
  while (lifl_ring_push(arena, from, to, &d) == LIFL_FULL) CHECK(lifl_now_ns() - begin < 60 * SECOND);
}

static int move(uint32_t block, uint32_t generation, uint32_t from, uint32_t state, uint32_t to, uint32_t new_state) {
  return lifl_block_move(arena, block, generation, from, state, to, new_state) == LIFL_OK;
}

static uint64_t next(uint32_t me, lifl_desc *d, uint32_t *from) {
  uint64_t begin = lifl_now_ns();
  while (lifl_inbox_pop(arena, me, d, from) != LIFL_OK) {
    CHECK(lifl_now_ns() - begin < 60 * SECOND);
    lifl_inbox_wait(arena, me, me % 2 ? 50000 : 0, 5 * SECOND);
  }
  return d->kind;
}

/* A sum block comes to a worker with the first message; it adds up what it reads, and sends it round. */
static void *worker(void *argument) {
  uint32_t me = (uint32_t)(uintptr_t)argument, from, sum = 0, generation = 0, is_away = 1, folded = 0, flood = 0;
  uint64_t *taken = calloc(1, sizeof *taken);
  for (lifl_desc d;;) {
    uint64_t kind = next(me, &d, &from);
    if (kind == STOP) break;
    if (kind == NOTHING) {
      CHECK(d.block == flood++);
      continue;
    }
    if (kind == SUM) { /* another's: read it, write into it, give it back */
      CHECK(move(d.block, d.generation, me, LIFL_COMMITTED, me, LIFL_READING));
      uint64_t *words = words_of(d.block, d.generation);
      for (int i = 1; i < WORDS; i++) CHECK(words[i] == words[0]);
      memset(words, 0, WORDS * sizeof *words);
      CHECK(move(d.block, d.generation, me, LIFL_READING, from, LIFL_ACCUM));
      push(me, from, SUM_BACK, d.block, d.generation);
      continue;
    }
    if (kind == SUM_BACK) {
      sum = d.block, generation = d.generation, is_away = 0;
      continue;
    }
    CHECK(kind == UPDATE);
    if (!move(d.block, d.generation, me, LIFL_READY, me, LIFL_READING)) continue; /* the agent took it back */
    uint64_t *words = words_of(d.block, d.generation);
    uint64_t first = words[0];
    for (int i = 1; i < WORDS; i++) CHECK(words[i] == first);
    lifl_note *note;
    CHECK(lifl_block_note(arena, d.block, &note) == LIFL_OK);
    CHECK(note->weight == (double)first);
    note->end_ns = first;
    ++*taken;
    if (!is_away) {
      uint64_t *into = words_of(sum, generation);
      for (int i = 0; i < WORDS; i++) into[i] += first;
      if (++folded % SUM_EVERY == 0 && me != 1) {
        CHECK(move(sum, generation, me, LIFL_ACCUM, 1, LIFL_COMMITTED));
        push(me, 1, SUM, sum, generation);
        is_away = 1;
      }
    }
    CHECK(move(d.block, d.generation, me, LIFL_READING, 0, LIFL_FREE));
    push(me, 0, FOLDED, d.block, d.generation);
  }
  return taken;
}

int main(void) {
  CHECK(lifl_arena_create((IN_FLIGHT + WORKERS + 2) * (uint64_t)UNIT, 1 + WORKERS, 7, &arena) == LIFL_OK);
  pthread_t threads[WORKERS];
  for (uint32_t me = 1; me <= WORKERS; me++) {
    uint32_t block, generation;
    CHECK(lifl_block_alloc(arena, WORDS * sizeof(uint64_t), me, LIFL_ACCUM, &block, &generation) == LIFL_OK);
    memset(words_of(block, generation), 0, WORDS * sizeof(uint64_t));
    push(0, me, SUM_BACK, block, generation);
    CHECK(pthread_create(&threads[me - 1], NULL, worker, (void *)(uintptr_t)me) == 0);
  }
  /* Rings that are full all the time: each slot is written over as soon as it has been read, and nothing but the
   * ring's own head says that it has. */
  for (uint32_t i = 0; i < FLOOD; i++)
    for (uint32_t me = 1; me <= WORKERS; me++) push(0, me, NOTHING, i, 0);
  uint64_t folded = 0, taken_back = 0;
  lifl_desc d;
  uint32_t from;
  for (uint64_t i = 0; i < UPDATES; i++) {
    uint32_t block, generation, me = 1 + (uint32_t)(i % WORKERS);
    while (i - folded - taken_back >= IN_FLIGHT) {
      CHECK(next(0, &d, &from) == FOLDED);
      lifl_note *note;
      CHECK(lifl_block_note(arena, d.block, &note) == LIFL_OK && note->end_ns == (uint64_t)note->weight);
      CHECK(lifl_block_reclaim(arena, d.block, d.generation, 1) == LIFL_OK);
      folded++;
    }
    CHECK(lifl_block_alloc(arena, WORDS * sizeof(uint64_t), 0, LIFL_WRITING, &block, &generation) == LIFL_OK);
    uint64_t *words = words_of(block, generation);
    for (int j = 0; j < WORDS; j++) words[j] = i;
    lifl_note *note;
    CHECK(lifl_block_note(arena, block, &note) == LIFL_OK);
    note->weight = (double)i;
    CHECK(move(block, generation, 0, LIFL_WRITING, me, LIFL_READY));
    push(0, me, UPDATE, block, generation);
    /* As a sweep does: one compare-and-swap decides who has it. */
    if (i % 7 == 0 && move(block, generation, me, LIFL_READY, 0, LIFL_FREE)) {
      CHECK(words[WORDS - 1] == i);
      CHECK(lifl_block_reclaim(arena, block, generation, 1) == LIFL_OK);
      taken_back++;
    }
  }
  while (folded + taken_back < UPDATES) {
    CHECK(next(0, &d, &from) == FOLDED);
    CHECK(lifl_block_reclaim(arena, d.block, d.generation, 0) == LIFL_OK);
    folded++;
  }
  uint64_t taken = 0;
  for (uint32_t me = 1; me <= WORKERS; me++) push(0, me, STOP, 0, 0);
  for (uint32_t me = 1; me <= WORKERS; me++) {
    void *count;
    CHECK(pthread_join(threads[me - 1], &count) == 0);
    taken += *(uint64_t *)count;
    free(count);
  }
  CHECK(taken == folded && taken + taken_back == UPDATES);
  lifl_arena_detach(arena);
  printf("%d updates passed, %lu of them taken back\n", UPDATES, (unsigned long)taken_back);
  return 0;
}
