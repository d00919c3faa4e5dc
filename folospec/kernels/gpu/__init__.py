"""Triton kernels, and what is laid out for them. A module with kernels in it imports triton;
`launch` and `sampling_arrays` do not, and nothing imports the others on a machine that has no use
for them. Their oracles are plain torch."""
