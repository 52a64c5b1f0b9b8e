/* What travels through a socket between aggregators, and what the kernel counts of it. Included by lifl.bpf.c; the
 * Python side packs the same bytes (lifl/ebpf/record.py), which a test compares. */
#ifndef LIFL_RECORD_H
#define LIFL_RECORD_H

/* Records are of one size, because a receiver does not see where a message began. */
#define LIFL_RECORD_BYTES 32

/* The launcher's own socket: what has no route, or whose socket is gone, goes there. */
#define LIFL_LAUNCHER 0xffffffffu

#define LIFL_MAX_SOCKETS 1024
#define LIFL_MAX_ROUTES 4096

/* Kinds of descriptor that are counted apart (lifl/shm/ring.py has them all): an update on its way to a leaf, and back. */
#define LIFL_KIND_UPDATE 3
#define LIFL_KIND_FOLDED 9

struct lifl_record {
  __u32 dst;     /* the aggregator that should have it; who that is, is the routing table's affair */
  __u16 src;     /* the participant that sent it */
  __u16 line;    /* the participant whose room it takes up: credits are kept per sender and this */
  __u32 seq;     /* its number on that line */
  __u32 busy_us; /* execution time of the sender since its last record, in microseconds */
  /* The descriptor, as it is in a ring: block, generation, round, kind, arg. */
  __u32 block;
  __u32 generation;
  __u32 round;
  __u16 kind;
  __u16 arg;
};

/* What is known of one participant, by its key among the sockets. Of each CPU there is one: sums are exact, of the first
 * times the least counts, of the last the most. */
struct lifl_metrics {
  __u64 records;  /* redirected to it */
  __u64 bytes;    /* of these */
  __u64 updates;  /* of these: updates to fold */
  __u64 first_ns; /* CLOCK_MONOTONIC at which the first of them passed; 0: none */
  __u64 last_ns;  /* and the last */
  __u64 folded;   /* updates that it has reported as folded */
  __u64 busy_ns;  /* execution time that it has reported */
  __u64 missed;   /* meant for it and redirected to the launcher, for it had no socket; the launcher's: without a route */
};

#endif
