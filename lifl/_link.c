/* Descriptors through sockets: a call sends or receives a record and takes or gives back its credit. ebpf/record.h has
 * the record; the kernel program (ebpf/lifl.bpf.c) decides its way. The caller owns the sockets, and nothing here waits
 * unless `waits` is set. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/types.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>

#include "_shm.h"
#include "_steps.h"
#include "ebpf/record.h"

_Static_assert(sizeof(struct lifl_record) == LIFL_RECORD_BYTES, "a record has holes");
_Static_assert(sizeof(lifl_link_record) == LIFL_RECORD_BYTES, "cffi's record is another one");
_Static_assert(offsetof(lifl_link_record, arg) == offsetof(struct lifl_record, arg), "cffi's record is another one");
_Static_assert(sizeof(((lifl_flow *)0)->bytes) % LIFL_RECORD_BYTES == 0, "room for whole records");

/* The errors of a kernel that cannot take a record now. EPIPE: the socket at the end of the route is just being closed,
 * because its process dies; a moment later it is gone from the map, and then the socket of the successor is there. */
static int is_not_now(int error) {
  return error == EAGAIN || error == EPIPE || error == ECONNRESET || error == ENOMEM || error == ENOBUFS;
}

/* Sends a whole record as it is, with the credit that it holds. LIFL_FULL: the kernel cannot take it now; with `waits`
 * the reason is not a lack of room. */
int lifl_link_forward(int fd, int waits, const uint8_t *record) {
  ssize_t sent;
  STEP();
  /* All of it or nothing: the kernel assembles a record before the program sees it. */
  do {
    sent = send(fd, record, LIFL_RECORD_BYTES, (waits ? 0 : MSG_DONTWAIT) | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  STEP();
  if (sent == LIFL_RECORD_BYTES) return LIFL_OK;
  if (sent >= 0) errno = EMSGSIZE;
  return is_not_now(errno) ? LIFL_FULL : LIFL_ESYS;
}

/* LIFL_FULL: the largest number of descriptors is on its way, or the kernel cannot take this one now. */
int lifl_link_send(lifl_arena *a, int fd, uint32_t source, uint32_t target, uint32_t dst, uint32_t busy_us,
                   const lifl_desc *desc) {
  uint32_t number;
  int status = lifl_credit_take(a, source, target, &number);
  if (status != LIFL_OK) return status;
  struct lifl_record record = {
      .dst = dst,
      .src = (__u16)source, /* there are fewer than 2^16 participants */
      .line = (__u16)target,
      .seq = number,
      .busy_us = busy_us,
      .block = desc->block,
      .generation = desc->generation,
      .round = desc->round,
      .kind = desc->kind,
      .arg = desc->arg,
  };
  status = lifl_link_forward(fd, 0, (const uint8_t *)&record);
  if (status == LIFL_OK) return LIFL_OK;
  int saved = errno;
  lifl_credit_untake(a, source, target);
  errno = saved;
  return status;
}

/* Receives the bytes that have come, if every earlier record has been popped; with `waits` it waits for some.
 * LIFL_EMPTY: no whole record is there, or a signal came. LIFL_GONE: the other end is closed. */
int lifl_link_fill(int fd, int waits, lifl_flow *in) {
  if (in->have - in->next >= LIFL_RECORD_BYTES) return LIFL_OK;
  in->have -= in->next; /* the first part of a record, whose rest has not come */
  memmove(in->bytes, in->bytes + in->next, in->have);
  in->next = 0;
  ssize_t count = recv(fd, in->bytes + in->have, sizeof in->bytes - in->have, waits ? 0 : MSG_DONTWAIT);
  if (count < 0) return errno == EAGAIN || errno == EINTR ? LIFL_EMPTY : LIFL_ESYS;
  if (count == 0) return LIFL_GONE;
  STEP(); /* from here on only this process has the bytes */
  in->have += (uint32_t)count;
  return in->have >= LIFL_RECORD_BYTES ? LIFL_OK : LIFL_EMPTY;
}

/* Takes the next record whose sender is a participant of this arena, and gives its credit back. */
int lifl_link_pop(lifl_arena *a, int fd, lifl_flow *in, lifl_link_record *out) {
  for (;;) {
    int status = lifl_link_fill(fd, 0, in);
    if (status != LIFL_OK) return status;
    memcpy(out, in->bytes + in->next, LIFL_RECORD_BYTES);
    in->next += LIFL_RECORD_BYTES;
    STEP();
    status = lifl_credit_give(a, out->src, out->line, out->seq);
    STEP();
    if (status == LIFL_OK) return LIFL_OK;
  }
}
