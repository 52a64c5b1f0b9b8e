/* The sidecar: routes records between the sockets of participants inside the kernel, and counts them on the way.
 *
 * The program runs in the sender's context, once for each record (SK_MSG, attached to the SOCKHASH that holds the
 * participants' sockets). A sender names an aggregator; `routes` has the key of the socket that this aggregator has
 * now, which the sender never sees.
 *
 * It relies on SK_MSG on TCP sockets with bpf_msg_redirect_hash(BPF_F_INGRESS), apply_bytes, cork_bytes, pull_data
 * (4.17, 4.18); per-CPU hash maps (4.6); CAP_BPF instead of root, and the clock for programs that are not under the GPL
 * (5.8). Measured on 6.18. For UDP and Unix sockets an insertion succeeds and the program silently never runs.
 *
 * clang compiles this source ahead (build.py; the bytecode ships with lifl), and bcc compiles it at load time. bcc has
 * its own way to declare a map: the first block is for bcc. There are only UAPI headers, so that nothing has to be
 * relocated. */
#ifdef LIFL_BCC

#include <uapi/linux/bpf.h>
#include "record.h"
BPF_SOCKHASH(socks, __u32, LIFL_MAX_SOCKETS);
BPF_HASH(routes, __u32, __u32, LIFL_MAX_ROUTES);
BPF_TABLE("percpu_hash", __u32, struct lifl_metrics, metrics, LIFL_MAX_ROUTES);
#define INLINE static __attribute__((always_inline)) inline
#define PROGRAM
INLINE struct lifl_metrics *find(__u32 *key) { return metrics.lookup(key); }
INLINE void add(__u32 *key, struct lifl_metrics *value) { metrics.insert(key, value); }
INLINE __u32 *route_of(__u32 *aggregator) { return routes.lookup(aggregator); }
INLINE int redirect(struct sk_msg_md *msg, __u32 *key) { return socks.msg_redirect_hash(msg, key, BPF_F_INGRESS); }

#else

#include <linux/bpf.h>
#include "record.h"

struct map {
  __u32 type, key_size, value_size, max_entries, flags;
};
#define MAP(name, kind, key, value, most) \
  __attribute__((section("maps"), used)) struct map name = {kind, sizeof(key), sizeof(value), most, 0}
MAP(socks, BPF_MAP_TYPE_SOCKHASH, __u32, __u32, LIFL_MAX_SOCKETS);
MAP(routes, BPF_MAP_TYPE_HASH, __u32, __u32, LIFL_MAX_ROUTES);
MAP(metrics, BPF_MAP_TYPE_PERCPU_HASH, __u32, struct lifl_metrics, LIFL_MAX_ROUTES);

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
                                   __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*bpf_msg_redirect_hash)(struct sk_msg_md *msg, void *map, void *key,
                                     __u64 flags) = (void *)BPF_FUNC_msg_redirect_hash;
static long (*bpf_msg_apply_bytes)(struct sk_msg_md *msg, __u32 bytes) = (void *)BPF_FUNC_msg_apply_bytes;
static long (*bpf_msg_cork_bytes)(struct sk_msg_md *msg, __u32 bytes) = (void *)BPF_FUNC_msg_cork_bytes;
static long (*bpf_msg_pull_data)(struct sk_msg_md *msg, __u32 start, __u32 end,
                                 __u64 flags) = (void *)BPF_FUNC_msg_pull_data;
#define INLINE static __attribute__((always_inline)) inline
#define PROGRAM __attribute__((section("sk_msg"), used))
INLINE struct lifl_metrics *find(__u32 *key) { return bpf_map_lookup_elem(&metrics, key); }
INLINE void add(__u32 *key, struct lifl_metrics *value) { bpf_map_update_elem(&metrics, key, value, BPF_NOEXIST); }
INLINE __u32 *route_of(__u32 *aggregator) { return bpf_map_lookup_elem(&routes, aggregator); }
INLINE int redirect(struct sk_msg_md *msg, __u32 *key) {
  return bpf_msg_redirect_hash(msg, &socks, key, BPF_F_INGRESS);
}

#endif

/* The counters of a participant; made at its first record. NULL only if the map is full: then nothing is counted. */
INLINE struct lifl_metrics *of(__u32 id) {
  struct lifl_metrics *found = find(&id);
  if (!found) {
    struct lifl_metrics none = {};
    add(&id, &none); /* fails if another CPU was first: then that entry is found */
    found = find(&id);
  }
  return found;
}

/* An atomic addition: another task may preempt the program on its CPU. */
#define COUNT(what, n) __sync_fetch_and_add(&(what), (n))

PROGRAM int lifl_route(struct sk_msg_md *msg) {
  /* One verdict for each record: apply_bytes cuts up a send of many records, cork_bytes assembles one in pieces. Both
   * together fail: if a send ends a begun record and goes on, the kernel (6.18) drops the rest. Senders send whole
   * records. */
  if (msg->size < LIFL_RECORD_BYTES) {
    bpf_msg_cork_bytes(msg, LIFL_RECORD_BYTES);
    return SK_PASS;
  }
  bpf_msg_apply_bytes(msg, LIFL_RECORD_BYTES);
  __u32 launcher = LIFL_LAUNCHER, key = launcher;
  long is_short = bpf_msg_pull_data(msg, 0, LIFL_RECORD_BYTES, 0); /* if the bytes lie apart; fails without memory */
  void *data = (void *)(long)msg->data, *end = (void *)(long)msg->data_end;
  if (is_short || data + LIFL_RECORD_BYTES > end) {
    redirect(msg, &launcher);
    return SK_PASS;
  }
  struct lifl_record *record = data;
  __u32 dst = record->dst, src = record->src, kind = record->kind, busy_us = record->busy_us;
  __u32 *route = route_of(&dst);
  if (route) key = *route;
  /* Never SK_DROP, which sticks to the sender; never SK_PASS without a redirect while there is a launcher: in a batch a
   * record that is only passed takes the way of the one before it. */
  int is_delivered = redirect(msg, &key) == SK_PASS;
  if (!is_delivered) redirect(msg, &launcher);

  struct lifl_metrics *to = of(key);
  if (to && is_delivered && route) {
    __u64 now = bpf_ktime_get_ns();
    COUNT(to->records, 1);
    COUNT(to->bytes, LIFL_RECORD_BYTES);
    if (kind == LIFL_KIND_UPDATE) COUNT(to->updates, 1);
    if (!to->first_ns) to->first_ns = now;
    to->last_ns = now;
  } else if (to) {
    COUNT(to->missed, 1);
  }
  if (busy_us || kind == LIFL_KIND_FOLDED) {
    struct lifl_metrics *from = of(src);
    if (from) {
      COUNT(from->busy_ns, busy_us * 1000ull);
      if (kind == LIFL_KIND_FOLDED) COUNT(from->folded, 1);
    }
  }
  return SK_PASS;
}
