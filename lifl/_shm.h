/* The declarations of lifl's C core. cffi reads them, so there is no preprocessor beyond the guard and no `_Atomic`;
 * _shm.c includes them. Every function is safe to call without the GIL.
 *
 * Two kinds of number name a block: the *unit*, lifl_unit_bytes() of the arena, at which the block begins, and a
 * *generation*, which rises each time the block is allocated or reclaimed. An old descriptor of a recycled block
 * therefore fails instead of showing the bytes of another update. */
#ifndef LIFL_SHM_H
#define LIFL_SHM_H
#include <stdint.h>
#endif

enum lifl_status {
  LIFL_OK = 0,
  LIFL_EMPTY = 1,    /* a ring or a socket has no descriptor */
  LIFL_FULL = 2,     /* a ring or the arena has no room */
  LIFL_TIMEOUT = 3,  /* no descriptor came in time */
  LIFL_STALE = 4,    /* the block has another generation, state or owner now */
  LIFL_OVERFLOW = 5, /* a mean left the range of its dtype */
  LIFL_GONE = 6,     /* the other end of a socket is closed */
  LIFL_EINVAL = -1,  /* an argument is out of its bounds */
  LIFL_ESYS = -2,    /* a system call failed: errno has the reason */
  LIFL_ECORRUPT = -3 /* the arena's header or tables contradict themselves */
};

enum lifl_dtype {
  LIFL_FLOAT32 = 0,
  LIFL_FLOAT64 = 1,
  LIFL_FLOAT16 = 2,
  LIFL_BFLOAT16 = 3,
  LIFL_INT8 = 4,
  LIFL_INT16 = 5,
  LIFL_INT32 = 6,
  LIFL_INT64 = 7,
  LIFL_UINT8 = 8,
  LIFL_BOOL = 9
};

/* The life of an update is FREE -> WRITING -> READY -> READING -> FREE, that of a partial sum
 * FREE -> ACCUM -> COMMITTED -> READING -> FREE. */
enum lifl_state {
  LIFL_FREE = 0,
  LIFL_WRITING = 1,
  LIFL_READY = 2,
  LIFL_READING = 3,
  LIFL_ACCUM = 4,
  LIFL_COMMITTED = 5
};

/* The content of a ring's slot: a message, 16 bytes. It is a hint about a block and never the content of the block.
 * lifl/shm/messages.py has the kinds and the meaning of their argument. */
typedef struct {
  uint32_t block;
  uint32_t generation;
  uint32_t round;
  uint16_t kind;
  uint16_t arg;
} lifl_desc;

/* Facts about a block beside its bytes. */
typedef struct {
  double weight;           /* of an update, > 0; of a mean, the weight by which its sum was divided */
  uint64_t num_updates;    /* of a mean */
  uint64_t begin_ns;       /* the begin of the fold, by CLOCK_MONOTONIC */
  uint64_t end_ns;         /* the commit */
  uint32_t has_overflowed; /* of a mean: 1 if a number or the weight left the range of its dtype */
} lifl_note;

/* The contents of a partial sum; the bytes of the sum follow at lifl_manifest_bytes(). */
typedef struct {
  uint64_t epoch;        /* of two committed sums of a leaf, the one with the higher epoch is the newer */
  uint64_t num_updates;  /* in the sum, over all batches */
  double weight;         /* of the sum, over all batches */
  double weight_low;     /* the part that a float64 cannot hold: weight + weight_low is exact to 2^-106 */
  uint32_t batch;        /* number of inputs of the last batch, listed below */
  uint32_t round;
  uint32_t blocks[64];
  uint32_t generations[64];
} lifl_manifest;

/* The record of ebpf/record.h, which passes through a socket, in a form that cffi reads. */
typedef struct {
  uint32_t dst;
  uint16_t src;
  uint16_t line;
  uint32_t seq;
  uint32_t busy_us;
  uint32_t block;
  uint32_t generation;
  uint32_t round;
  uint16_t kind;
  uint16_t arg;
} lifl_link_record;

/* Bytes that came through a socket: `have` of them, of which the first `next` have been popped. */
typedef struct {
  uint32_t have;
  uint32_t next;
  uint8_t bytes[4096];
} lifl_flow;

typedef struct lifl_arena lifl_arena; /* the handle of a process on an arena */

uint64_t lifl_unit_bytes(void);
uint64_t lifl_manifest_bytes(void);
uint32_t lifl_batch_max(void);
uint32_t lifl_none(void);
const char *lifl_vector_width(void);

int lifl_arena_create(uint64_t payload_bytes, uint32_t participants, uint64_t node_id, lifl_arena **out);
int lifl_arena_attach(int fd, lifl_arena **out);
void lifl_arena_detach(lifl_arena *arena);
int lifl_arena_fd(const lifl_arena *arena);
uint32_t lifl_arena_units(const lifl_arena *arena);
uint32_t lifl_arena_free_units(const lifl_arena *arena);
uint32_t lifl_arena_participants(const lifl_arena *arena);
uint64_t lifl_arena_node_id(const lifl_arena *arena);
uint64_t lifl_arena_total_bytes(const lifl_arena *arena);

/* The allocator's state is private to the process that created the arena, its owner: only the owner allocates. */
int lifl_block_alloc(lifl_arena *arena, uint64_t nbytes, uint32_t owner, uint32_t state, uint32_t *block,
                     uint32_t *generation);
int lifl_block_reserve(lifl_arena *arena, uint64_t nbytes, uint32_t owner, uint32_t state, uint32_t *block,
                       uint32_t *generation);
int lifl_block_reclaim(lifl_arena *arena, uint32_t block, uint32_t generation, int poison);
int lifl_block_move(lifl_arena *arena, uint32_t block, uint32_t generation, uint32_t from_owner,
                    uint32_t from_state, uint32_t to_owner, uint32_t to_state);
int lifl_block_read(lifl_arena *arena, uint32_t block, uint32_t *generation, uint32_t *owner,
                    uint32_t *state, uint64_t *nbytes, uint32_t *extents);
int lifl_block_map(lifl_arena *arena, uint32_t block, uint32_t generation, void **address, uint64_t *nbytes);
int lifl_block_unmap(lifl_arena *arena, void *address, uint64_t nbytes);
int lifl_block_note(lifl_arena *arena, uint32_t block, lifl_note **note);

int lifl_ring_capacity(lifl_arena *arena, uint32_t producer, uint32_t consumer);
int lifl_ring_push(lifl_arena *arena, uint32_t producer, uint32_t consumer, const lifl_desc *desc);
int lifl_ring_pop(lifl_arena *arena, uint32_t producer, uint32_t consumer, lifl_desc *desc);
int lifl_ring_reset(lifl_arena *arena, uint32_t producer, uint32_t consumer);
int lifl_credit_take(lifl_arena *arena, uint32_t producer, uint32_t consumer, uint32_t *number);
int lifl_credit_untake(lifl_arena *arena, uint32_t producer, uint32_t consumer);
int lifl_credit_give(lifl_arena *arena, uint32_t producer, uint32_t consumer, uint32_t number);
int lifl_credit_reset(lifl_arena *arena, uint32_t consumer);
int lifl_link_send(lifl_arena *arena, int fd, uint32_t source, uint32_t target, uint32_t dst, uint32_t busy_us,
                   const lifl_desc *desc);
int lifl_link_forward(int fd, int waits, const uint8_t *record);
int lifl_link_fill(int fd, int waits, lifl_flow *in);
int lifl_link_pop(lifl_arena *arena, int fd, lifl_flow *in, lifl_link_record *out);
int lifl_inbox_counts(lifl_arena *arena, uint32_t consumer, uint64_t *sent, uint64_t *taken);
int lifl_inbox_pop(lifl_arena *arena, uint32_t consumer, lifl_desc *desc, uint32_t *producer);
int lifl_inbox_wait(lifl_arena *arena, uint32_t consumer, uint64_t spin_ns, uint64_t timeout_ns);
int lifl_inbox_arm(lifl_arena *arena, uint32_t consumer);
int lifl_peer_wake(lifl_arena *arena, uint32_t consumer);
int lifl_peer_eventfd(lifl_arena *arena, uint32_t consumer, int fd);

uint64_t lifl_dtype_bytes(uint32_t dtype);
uint64_t lifl_sum_bytes(uint32_t dtype);
int64_t lifl_copy_finite(uint32_t dtype, void *target, const void *source, uint64_t count);
int lifl_fold(uint32_t dtype, void *sum, const void *previous, const void *const *updates,
              const double *weights, uint32_t n, uint64_t count);
int lifl_finish(uint32_t dtype, void *mean, const void *const *sums, uint32_t n, const void *const *updates,
                const double *weights, uint32_t num_updates, double weight, double weight_low, uint64_t count);
int lifl_flower(uint32_t dtype, void *mean, const void *const *updates, const double *factors, uint32_t n,
                uint64_t count);

double lifl_bench_read(const void *source, uint64_t nbytes, uint32_t rounds);
uint64_t lifl_now_ns(void);
