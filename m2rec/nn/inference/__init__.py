"""The network for inference on a CPU: what depends on an item alone is a table, the rest few passes in place.

The modules are those of `m2rec.nn`, part by part. The results are those of `Encoder`, to rounding. A branch
without a prepared form runs as it is; `branches.PREPARED` names the forms.
"""
