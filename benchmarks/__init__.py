"""Benchmarks of vlp-plugins: the demo, parity with published code, speed, the papers' tables."""
