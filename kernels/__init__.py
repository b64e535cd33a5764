"""Operations on tensors for block-sparse prefill and ragged decode. No model, no files, no Ray.

One folder per operation: the public function validates and picks an implementation, `reference.py` is the
specification in plain torch, `triton.py` the portable GPU path, `gluon*.py` the Hopper path where it pays.
Nothing here imports a GPU-only package until a GPU implementation is chosen.
"""
