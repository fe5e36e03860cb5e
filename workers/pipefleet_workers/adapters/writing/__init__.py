"""Adapters of models that write a text with generate().

`generate.py` serves decoders, `seq2seq.py` encoder-decoders, `multimodal.py` models with media; `equal_shapes.py` serves models
that padding would change. `plan.py` sorts the arguments of a request, `rows.py` applies the part that each row has for itself.
"""
