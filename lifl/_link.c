/* Descriptors through sockets: a record is sent or received in one call, with the credit that it takes up or gives
 * back. The records are those of ebpf/record.h; what becomes of one on its way is the kernel program's affair
 * (ebpf/lifl.bpf.c). Sockets are borrowed, nothing here waits unless it is told to. */
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

/* What the kernel says when it cannot take a record in now. EPIPE: the socket that it would redirect to is just being
 * closed, because its process dies; a moment later it is gone from the map, and then its successor's is there. */
static int is_not_now(int error) {
  return error == EAGAIN || error == EPIPE || error == ECONNRESET || error == ENOMEM || error == ENOBUFS;
}

/* Sends a whole record as it is, its credit with it. LIFL_FULL: the kernel cannot take it in now, which with `waits` is
 * not for want of room. */
int lifl_link_forward(int fd, int waits, const uint8_t *record) {
  ssize_t sent;
  STEP();
  /* All of it or nothing: a record is put together in the kernel before it is looked at. */
  do {
    sent = send(fd, record, LIFL_RECORD_BYTES, (waits ? 0 : MSG_DONTWAIT) | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  STEP();
  if (sent == LIFL_RECORD_BYTES) return LIFL_OK;
  if (sent >= 0) errno = EMSGSIZE;
  return is_not_now(errno) ? LIFL_FULL : LIFL_ESYS;
}

/* LIFL_FULL: as many are on their way as may be, or the kernel cannot take it in now. */
int lifl_link_send(lifl_arena *a, int fd, uint32_t source, uint32_t target, uint32_t dst, uint32_t busy_us,
                   const lifl_desc *desc) {
  uint32_t number;
  int status = lifl_credit_take(a, source, target, &number);
  if (status != LIFL_OK) return status;
  struct lifl_record record = {
      .dst = dst,
      .src = (__u16)source, /* participants are fewer than 2^16 */
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

/* Receives what has come, once every record of before has been popped; with `waits` until something comes. LIFL_EMPTY:
 * no whole record, or a signal. LIFL_GONE: the other end is closed. */
int lifl_link_fill(int fd, int waits, lifl_flow *in) {
  if (in->have - in->next >= LIFL_RECORD_BYTES) return LIFL_OK;
  in->have -= in->next; /* the beginning of a record whose rest has not come */
  memmove(in->bytes, in->bytes + in->next, in->have);
  in->next = 0;
  ssize_t count = recv(fd, in->bytes + in->have, sizeof in->bytes - in->have, waits ? 0 : MSG_DONTWAIT);
  if (count < 0) return errno == EAGAIN || errno == EINTR ? LIFL_EMPTY : LIFL_ESYS;
  if (count == 0) return LIFL_GONE;
  STEP(); /* the kernel has it no more */
  in->have += (uint32_t)count;
  return in->have >= LIFL_RECORD_BYTES ? LIFL_OK : LIFL_EMPTY;
}

/* The next record that a participant of this arena has sent, whose credit is given back. */
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
