"""Decides which worker does what, and never acts: pure functions over frozen values.

It has no clock, file, process or global: times and loads are arguments, and the same arguments give the same plan. The
ideas are LIFL's (Qi, Ramakrishnan, Lee; MLSys 2024); each rule states its formula where it is applied.
"""
