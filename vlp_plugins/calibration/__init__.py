"""Passes over calibration data, and the statistics that they gather. Rank 3."""
