"""The second transport: descriptors routed between the sockets of aggregators in the kernel, and counted there.

`record` is what travels, `bpf` the system call, `prebuilt` and `compiled` the two ways to load the program, `probe`
what this machine allows, `sidecar` a launcher's program, maps and sockets, `links` both ends as the rings have them.
"""
