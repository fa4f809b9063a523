"""Triton kernels, one op per file, installed as `fastlora.kernels`."""
