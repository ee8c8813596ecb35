"""From measurements of real engines to profiles, and from profiles back to measurements.

`read` imports a file, `batches` finds out which requests shared each engine step, `fit` turns
steps into coefficients, `calibrate` makes a profile of them with its held-out error, `replay`
runs a measured run again in the simulator, and `validate` sets the two beside each other.
"""
