"""Benchmarks of vlp-plugins: the demo, parity with published code, and speed."""
