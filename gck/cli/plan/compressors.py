"""The compressors that a plan compares, written as in Python."""

from __future__ import annotations

import ast

from gck.compressor import REGISTRY, Compressor, compressor_class, compressor_of_step
from gck.errors import ArgumentError, GckError
from gck.factored import is_factored

__all__ = ["CANDIDATES", "parse"]

# From the mildest to the coarsest of dense ones, then sparse ones; the README says when each is right.
CANDIDATES = (
    "Quantize(bits=8)",
    "Quantize(bits=4)",
    'Quantize(bits=2, scale="mean")',
    "Sign()",
    "ChunkTopK(k=64, chunk_size=4096, value_bits=2)",
    "TopK(ratio=0.01)",
    'TopK(ratio=0.01, value_bits=8, index_codec="elias_fano")',
    "RandomK(ratio=0.01)",
)


def parse(text: str) -> Compressor:
    """The compressor that "TopK(ratio=0.001)", or "gck.TopK(ratio=0.001)", says. Runs no code of the text.

    One with `seed=step`, or with none where it needs one, costs what it does with any.

    Raises:
        ArgumentError: no compressor is called so, or not with these arguments; or its bytes depend on a shape
            that they don't say.
    """
    classes = {REGISTRY[name].partition(":")[2]: name for name in REGISTRY}
    source = text.strip().removeprefix("gck.").replace("seed=step", "seed=1")
    try:
        call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call")
        made = compressor_class(classes[call.func.id])
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError):
        known = ", ".join(sorted(classes))
        raise ArgumentError(
            f'--compressor must be like "TopK(ratio=0.001)", of {known}, with plain values; got {text!r}'
        ) from None
    try:
        compressor: Compressor = compressor_of_step(made(*positional, **named), 1, 0)
    except (TypeError, GckError) as error:
        raise ArgumentError(f"--compressor {text!r}: {error}") from error
    if is_factored(compressor) and compressor.columns is None:
        raise ArgumentError(
            f"--compressor {text!r}: of a model it must know how long the rows of its matrices are, as in "
            f'"LowRank(rank=4, columns=768)"'
        )
    return compressor
