"""Operations on tensors for block-sparse prefill and ragged decode. No model, no files, no Ray.

One folder per operation: `api.py` has the public function, which validates and picks an implementation;
`reference.py` is the specification in plain torch, `triton.py` the portable GPU path, `gluon.py` the Hopper path where
it pays. An operation uses what others export and what `_common` holds, never another's implementation.
Nothing here imports a GPU-only package until a GPU implementation is chosen.
"""
