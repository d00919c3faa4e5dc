"""Holds the Triton kernels, and the arrays that they read.

A module with kernels in it imports triton; `launch` and `sampling_arrays` do not, and nothing
imports the others on a machine that has no use for them. Plain torch is the reference of each.
"""
