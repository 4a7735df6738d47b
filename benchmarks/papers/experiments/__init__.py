"""Table 10: experiments of NNI whose trials are cells.

`searches` says what is searched, `experiment` runs it, `trial` is what NNI starts for every draw.
"""
