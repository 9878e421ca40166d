"""Which numbers this program computes: a version of the arithmetic, not of the text that says it. Knows no code."""

from __future__ import annotations

NUMERICS_VERSION = 1
"""What decides, beside the model file and the ids, each bit of the logits and of K and V that are kept.

That is: the order of every sum (blocks of a row, the lanes and the tree of norms and attention, experts by id), where
a product is rounded and where it is fused, our polynomials (exp, sigmoid, rsqrt), the angles of the rotation, how each
block format is decoded and activations are rounded to int8, and where in a page the K and V of a position lie, in f16
and in q8_0, those of prediction modules included.

K and V that were kept under one version are read under the same only. Raise it by 1 when a change alters any of this
for any model, and then only: neither a comment nor another name, another form of a kernel or number of threads does.
tests/recorded/logits.json holds hashes of logits for each version, and its test fails where they change and this does
not. It cannot see a layout of pages that gives the same logits: raise it for that, too.
"""
