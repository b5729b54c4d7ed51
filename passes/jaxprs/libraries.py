"""What a GPU has libraries for, and how much work that is."""

import math
from typing import Any

from jax.extend.core import JaxprEqn

from passes.jaxprs.look import nbytes
from passes.jaxprs.private import MaskType

# cuDNN's, and how many matmuls, each of the size of queries with keys, one does.
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def library_work(eqn: JaxprEqn) -> tuple[int, int]:
    """Return the operations, and the bytes read and written, of what a GPU has libraries for.

    Also of kernels, if they say. All else is 0 and 0. Of attention with a causal mask half is done.
    """
    name = eqn.primitive.name
    operands: list[Any] = [x.aval for x in (*eqn.invars, *eqn.outvars)]
    if name == "dot_general":
        ((contracted, _), _), lhs = eqn.params["dimension_numbers"], operands[0]
        return 2 * operands[-1].size * math.prod(lhs.shape[d] for d in contracted), nbytes(operands)
    if name == "conv_general_dilated":
        kernel, spec = operands[1], eqn.params["dimension_numbers"].rhs_spec
        flops = 2 * operands[-1].size * kernel.size // kernel.shape[spec[0]]
        return flops, nbytes(operands)
    if name in _ATTENTION:
        (B, T, N, H), S = operands[0].shape, operands[1].shape[1]
        window = eqn.params["sliding_window_length"]
        pairs = B * N * (T * min(S, window) if window else T * S)
        halved = not window and eqn.params["mask_type"] == MaskType.CAUSAL
        return _ATTENTION[name] * 2 * H * pairs // (2 if halved else 1), nbytes(operands)
    if name == "pallas_call" and eqn.params["cost_estimate"] is not None:
        return eqn.params["cost_estimate"].flops, nbytes(operands)
    return 0, 0
