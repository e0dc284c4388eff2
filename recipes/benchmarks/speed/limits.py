"""What bounds a step on this machine: matrix products by their rows, attention by its keys.

python recipes/benchmarks/speed/limits.py

Shapes are those of SmolLM2-135M. A prompt's step has 1/B of the peer's tokens to run, and so fewer rows a product;
where products of few rows are slower a row, the ratio of times stays below the ratio of tokens. A step of generation
reads the prefix in a call of its own, whose fixed cost stands beside the few rows of a layer's products.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ptune.injection.kernels import kernel_for
from hf_ptune.injection.merge import merged_attention

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # [out, in]
HEAD = ((49152, 576),)


def seconds(action: Callable[[], object], repeats: int = 15) -> float:
    """Median wall time."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def products(shapes: tuple[tuple[int, int], ...], rows: int) -> float:
    """Gigaflops a second of forward and input-gradient products."""
    weights = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(rows, w.shape[1]) for w in weights]
    grads = [torch.randn(rows, w.shape[0]) for w in weights]

    def both() -> None:
        for weight, x, grad in zip(weights, inputs, grads, strict=True):
            x @ weight.T
            grad @ weight

    work = sum(4 * rows * w.numel() for w in weights)
    return work / seconds(both) / 1e9


def attention(virtual: int, rows: int = 4, length: int = 128) -> float:
    """Milliseconds of forward and backward of one layer over a prefix and own tokens."""
    query, key, value = (
        torch.randn(rows, heads, length + extra, 64) for heads, extra in ((9, 0), (3, virtual), (3, virtual))
    )
    tensors: list[Tensor] = [t.requires_grad_() for t in (query, key, value)]
    mask = torch.full((length, virtual + length), -1e30).triu(virtual + 1)
    grad = torch.randn(rows, 9, length, 64)

    def both() -> None:
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
        torch.autograd.grad(output, tensors, grad)

    return 1000 * seconds(both)


@torch.no_grad()
def generation(virtual: int, rows: int = 8, length: int = 48) -> float:
    """Microseconds of one layer's attention in a step of generation, over a shared prefix and own tokens."""
    query, key, value = (torch.randn(rows, heads, count, 64) for heads, count in ((9, 1), (3, length), (3, length)))
    kernel = kernel_for("cpu", torch.float32, 64)
    assert kernel is not None
    if not virtual:
        return 1e6 * seconds(lambda: kernel.forward(query, key, value, None, False, 0.125), 300)
    prefix = torch.randn(2, 3, virtual, 64).unbind()
    return 1e6 * seconds(lambda: merged_attention(query, key, value, *prefix, None, False, None, kernel), 300)


def main() -> None:
    torch.set_num_threads(2)
    print("| rows | layer products, GF/s | vocabulary projection, GF/s |\n| --- | --- | --- |")
    for rows in (100, 128, 228, 528, 2112):
        print(f"| {rows} | {products(LAYER * 6, rows):.0f} | {products(HEAD, rows):.0f} |", flush=True)
    print("\n| keys of a prefix | attention of a layer, B 4 S 128, ms |\n| --- | --- |")
    for virtual in (0, 20, 128):
        print(f"| {virtual} | {attention(virtual):.1f} |", flush=True)
    weights = [torch.randn(shape) for shape in LAYER]
    states = [torch.randn(8, w.shape[1]) for w in weights]
    whole = 1e6 * seconds(lambda: [x @ w.T for x, w in zip(states, weights, strict=True)], 300)
    print(f"\nA layer's products in a step of generation, B 8: {whole:.0f} us")
    print("| keys of a prefix | attention of a layer in a step of generation, us |\n| --- | --- |")
    for virtual in (0, 20, 100, 200):
        print(f"| {virtual} | {generation(virtual):.0f} |", flush=True)


if __name__ == "__main__":
    main()
