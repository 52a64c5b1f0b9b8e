"""Decides which runtime does what, and never acts: pure functions over frozen values.

No clock, no file, no process, no global: times and loads come in as arguments, and the same arguments give the same
plan. The ideas are LIFL's (Qi, Ramakrishnan, Lee; MLSys 2024); each rule states its formula where it is applied.
"""
