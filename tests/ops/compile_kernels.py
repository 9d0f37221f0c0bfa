"""Compile every Triton kernel for a GPU (compute capability 9.0), which needs none. A script: the
interpreter, which the tests use on a CPU, takes some things that the compiler does not.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from m2rec.ops import causal_conv1d_triton as conv
from m2rec.ops import selective_scan_triton as scan
from m2rec.ops import ssd_triton as ssd

INPUTS = "u delta B C z y dy du ddelta dz x weight bias dx".split()  # in the type of the model's activations
FLOAT32 = "A A2 D dt h0 last saved dlast dstate dA dB dC dD ddt dbias dweight".split()


def compile_for(kernel: Any, dtype: str, absent: tuple[str, ...], num_warps: int, **constants: Any) -> None:
    """Compile with these constants, without the arguments that are absent."""
    signature, known = {}, {}
    for name in kernel.arg_names:
        if name in absent:
            known[name] = None
        elif name in constants:
            known[name] = constants[name]
        elif name.endswith("_l"):
            known[name] = 128
        signature[name] = "constexpr" if name in known else "i32"
        if name in INPUTS + FLOAT32 and name not in known:
            signature[name] = f"*{dtype if name in INPUTS else 'fp32'}"
    source = ASTSource(fn=kernel, signature=signature, constexprs=known)
    compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    print(f"{kernel.fn.__module__} {kernel.fn.__name__} {dtype}, without {' '.join(absent) or 'nothing'}")


if __name__ == "__main__":
    sizes = {"E": 128, "N": 32, "CHUNK": scan._CHUNK, "SOFTPLUS": True}
    taps = {"E": 128, "K": 4, "w_e": 4, "SILU": True, "BLOCK_L": conv._BLOCK_L, "BLOCK_E": conv._BLOCK_E}
    for dtype, absent in (
        ("bf16", ()),
        ("fp32", ("D", "z", "bias", "h0", "dD", "dz", "dbias")),
    ):
        compile_for(scan._forward_kernel, dtype, absent, 1, **sizes, BLOCK_N=32, BLOCK_E=scan._FORWARD_BLOCK)
        compile_for(scan._backward_kernel, dtype, absent, 1, **sizes, BLOCK_E=scan._BACKWARD_BLOCK)
    for dtype in ("fp32", "bf16"):
        compile_for(conv._forward_kernel, dtype, (), 2, **taps)
        compile_for(conv._backward_kernel, dtype, (), 4, **taps, BLOCK_K=4)
    for dtype, absent, P, N in (
        ("bf16", (), 64, 128),
        ("fp32", ("D", "h0", "dD", "dlast"), 5, 3),
    ):
        tiles = ssd._choose_block_sizes(torch.empty(1, 1, 1, P), torch.empty(1, 1, N))
        for kernel in (ssd._forward_kernel, ssd._backward_kernel):
            compile_for(kernel, dtype, absent, ssd._choose_warps(tiles), **tiles)
