/* The record that passes through a socket between participants, and the kernel's counters. lifl.bpf.c and _link.c
 * include this; the Python side packs the same bytes (lifl/ebpf/record.py), and a test compares the two. */
#ifndef LIFL_RECORD_H
#define LIFL_RECORD_H

/* All records have this size, because a receiver does not see where a record begins. */
#define LIFL_RECORD_BYTES 32

/* The key of the launcher's socket. The launcher is the owner of the Node; it gets each record that has no route, or
 * whose receiver's socket is gone. */
#define LIFL_LAUNCHER 0xffffffffu

#define LIFL_MAX_SOCKETS 1024
#define LIFL_MAX_ROUTES 4096

/* The kinds with counters of their own (lifl/shm/messages.py has all kinds): an update to a leaf, and its report. */
#define LIFL_KIND_UPDATE 3
#define LIFL_KIND_FOLDED 9

struct lifl_record {
  __u32 dst;     /* the aggregator that gets it; the routing table has its participant */
  __u16 src;     /* the participant that sent it */
  __u16 line;    /* the receiver whose credit it holds: there are credits for each pair of src and line */
  __u32 seq;     /* its number among the records from src on that line */
  __u32 busy_us; /* execution time of the sender since its last record, in microseconds */
  /* The descriptor, as it is in a ring: block, generation, round, kind, arg. */
  __u32 block;
  __u32 generation;
  __u32 round;
  __u16 kind;
  __u16 arg;
};

/* The counters of a participant, by the key of its socket. There is one for each CPU: sums are exact, the first time is
 * the least of all CPUs, the last time the greatest. */
struct lifl_metrics {
  __u64 records;  /* redirected to it */
  __u64 bytes;    /* of these records */
  __u64 updates;  /* updates among these records */
  __u64 first_ns; /* time of the first record, by CLOCK_MONOTONIC; 0: none */
  __u64 last_ns;  /* time of the last record */
  __u64 folded;   /* updates that it has reported as folded */
  __u64 busy_ns;  /* execution time that it has reported */
  __u64 missed;   /* went to the launcher, because it had no socket; at the launcher's key: because there was no route */
};

#endif
