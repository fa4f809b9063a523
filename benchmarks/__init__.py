"""Microbenchmarks: one registry entry per op, installed as `fastlora.benchmarks`."""
