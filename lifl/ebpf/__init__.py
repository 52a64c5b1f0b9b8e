"""The second transport: the kernel routes descriptors between the sockets of participants, and counts them.

`record` has the bytes of a message, `bpf` the system call, `prebuilt` and `compiled` the two loaders of the program,
`probe` the reasons why this machine may refuse it, `sidecar` the owner's program, maps and sockets, `links` the two
ends of a socket, with the interface of the rings.
"""
