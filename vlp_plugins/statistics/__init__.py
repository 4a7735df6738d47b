"""What a pass over calibration data gathers for a weight.

`base` says what a statistic is, every statistic has a file, `vlp_plugins.calibration` takes them
while a model runs and `store` keeps them.
"""
