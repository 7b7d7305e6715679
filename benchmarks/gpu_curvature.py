"""What curvature costs on a device: time, memory, bandwidth, for GPTs of 1 M to 1 B parameters.

    python benchmarks/gpu_curvature.py                              # on a GPU
    python benchmarks/gpu_curvature.py --device cpu --sizes 1e6     # a smoke test

Three tables. Time: a product over a gradient (a forward and a backward pass with the kernels that a
training would use), and the largest eigenvalue with its certificate. Memory: peaks as multiples of
the parameters' own. Bandwidth: what reorthogonalisation reaches, of what a copy on the same device
does. Sizes that do not fit are named and left out.

GPU times are between CUDA events, on a warmed-up device, medians over repeats; random tokens and
weights at their initial values, float32 throughout.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndiag.curvature import Operator, eigenpairs, hessian
from dyndiag.curvature.lanczos import Lanczos
from dyndiag.errors import DyndiagError

SIZES = (1e6, 1e7, 1e8, 3e8, 1e9)
GIB = 2**30


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Pre-norm, heads of 64, learned positions, embeddings tied to the output layer."""

    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.positions(places))
        return F.linear(self.norm(x), self.tokens.weight)


def shape(size: float) -> tuple[int, int, int]:
    """(vocabulary, width, layers) of a GPT of about this size, its width 64 times its layers."""
    width = max(64, 64 * round((size * 64 / 12) ** (1 / 3) / 64))
    vocabulary = min(32768, 2 ** int(size / (5 * width)).bit_length() // 2)
    layers = max(1, round((size - vocabulary * width) / (12 * width**2)))
    return vocabulary, width, layers


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Meter:
    """Seconds and bytes on one device."""

    device: torch.device
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Median over repeats, after two that warm up."""
        for _ in range(2):
            work()
        return statistics.median(self.once(work) for _ in range(self.repeats))

    def once(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def peak(self, work: Callable[[], object]) -> float:
        """Bytes at most allocated in the meantime, all in all; NaN where nobody counts them."""
        if not self.cuda:
            work()
            return float("nan")
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return float(torch.cuda.max_memory_allocated(self.device))

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def curvature_of(size: float, meter: Meter, sequences: int, length: int) -> str:
    """The lines on one model for the tables of time and of memory."""
    torch.manual_seed(0)
    vocabulary, width, layers = shape(size)
    with meter.device:
        model = GPT(vocabulary, width, layers, length).eval()
        tokens = torch.randint(vocabulary, (sequences, length + 1))
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    own = 4.0 * count

    def gradient() -> None:
        torch.autograd.grad(next_token(model, tokens), parameters)

    gradient_seconds = meter.seconds(gradient)
    gradient_peak = meter.peak(gradient)
    built: list[float] = []

    def build() -> None:
        built.clear()
        built.append(hessian(model, next_token, tokens).loss)

    build_peak = meter.peak(build)  # with the check of the engine, which comes once
    operator = hessian(model, next_token, tokens)
    v = torch.randn(operator.size, device=meter.device)
    product_seconds = meter.seconds(lambda: operator.product(v))
    product_peak = meter.peak(lambda: operator.product(v))
    found = [eigenpairs(operator, max_products=1)]  # warms up

    def top() -> None:
        found[0] = eigenpairs(operator)

    top_seconds = meter.once(top)
    top_peak = meter.peak(top)
    pairs = found[0]
    upper = float("inf") if pairs.upper_bound is None else pairs.upper_bound
    return (
        f"| {count:,} | {width} × {layers}, {vocabulary:,} | {operator.engine.name} "
        f"| {1e3 * gradient_seconds:.2f} | {1e3 * product_seconds:.2f} "
        f"| {product_seconds / gradient_seconds:.2f} "
        f"| {pairs.values[0].item():.4g} ≤ {upper:.4g}{'' if pairs.converged else ' (open)'} "
        f"| {pairs.products} | {top_seconds / gradient_seconds:.1f} "
        f"| {gradient_peak / own:.1f} | {build_peak / own:.1f} | {product_peak / own:.1f} "
        f"| {top_peak / own:.1f} | {top_peak / GIB:.2f} |"
    )


HEAD = (
    "| parameters | width × layers, vocabulary | engine | gradient, ms | product, ms "
    "| product / gradient | λ₁ and its bound | products | λ₁ in gradients "
    "| peak: gradient | building | product | λ₁ | λ₁, GiB |"
)


def copy_bandwidth(meter: Meter, count: int) -> float:
    """Bytes read and written a second by a copy of so many float32 numbers."""
    source = torch.randn(count, device=meter.device)
    target = torch.empty_like(source)
    return 8 * count / meter.seconds(lambda: target.copy_(source))


def reorthogonalisation_bandwidth(meter: Meter, size: int, rows: int) -> float:
    """Bytes a second at which one of the two passes against `rows` basis vectors reads them.

    A pass reads the basis twice: for the coefficients, and to subtract. The vector itself, read and
    written once a block, is not counted: in favour of the copy.
    """
    scales = torch.linspace(0, 1, size, device=meter.device)
    diagonal = Operator(lambda v: scales * v, size, torch.float32, meter.device)
    run = Lanczos(diagonal, torch.randn(size, device=meter.device))
    for _ in range(rows - 1):
        run.extend()
    v = torch.randn(size, device=meter.device)
    seconds = meter.seconds(lambda: run._project(v, rows))
    return 2 * 4 * rows * size / seconds


def bandwidth_of(size: int, meter: Meter, rows: int, copied: float) -> str:
    """The line on one size for the table of bandwidth."""
    reached = reorthogonalisation_bandwidth(meter, size, rows)
    return (
        f"| {size:.0e} × {rows} | {4 * size * rows / GIB:.3g} | {copied / 1e9:.0f} "
        f"| {reached / 1e9:.0f} | {reached / copied:.2f} |"
    )


def memory_needed(size: float, sequences: int, length: int) -> float:
    """Bytes that a gradient, the least of it all, will take: weights, their gradient, logits."""
    return 4 * (2 * size + 2 * sequences * length * shape(size)[0])


def free(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def attempt(size: float, meter: Meter, work: Callable[[], str]) -> None:
    """Print what `work` found, or that this size does not fit."""
    try:
        print(work(), flush=True)
    except (torch.OutOfMemoryError, DyndiagError) as error:
        print(f"| {size:.0e}: does not fit: {str(error).splitlines()[0][:120]} |", flush=True)
    meter.clean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--sequences", type=int, default=None, help="4 on a GPU, 2 on a CPU")
    parser.add_argument("--length", type=int, default=None, help="512 on a GPU, 32 on a CPU")
    parser.add_argument("--repeats", type=int, default=None, help="20 on a GPU, 3 on a CPU")
    parser.add_argument("--rows", type=int, default=32, help="of the basis, for the bandwidth")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    meter = Meter(device, options.repeats or (20 if gpu else 3))
    sequences = options.sequences or (4 if gpu else 2)
    length = options.length or (512 if gpu else 32)
    print(f"{name_of(device)}; torch {torch.__version__}; {sequences} × {length} tokens, float32\n")

    print(HEAD + "\n|" + " --- |" * (HEAD.count("|") - 1))
    for size in options.sizes:
        needed = memory_needed(size, sequences, length)
        if needed > free(device):
            print(f"| {size:.0e}: does not fit: a gradient alone takes {needed / GIB:.0f} GiB |")
            continue
        attempt(size, meter, partial(curvature_of, size, meter, sequences, length))
    print("\nPeaks: all that is allocated at once, in multiples of the parameters' 4 bytes each.")

    head = "| size | basis, GiB | copy, GB/s | reorthogonalisation, GB/s | of the copy |"
    print("\n" + head + "\n|" + " --- |" * (head.count("|") - 1))
    copied = copy_bandwidth(meter, int(min(2**29, free(device) / 16)) if gpu else 2**24)
    meter.clean()
    for size in options.sizes:
        rows = int(min(options.rows, free(device) / (4 * size) - 8))
        if rows < 2:
            print(f"| {size:.0e}: does not fit: fewer than 2 rows |")
            continue
        attempt(size, meter, partial(bandwidth_of, int(size), meter, rows, copied))
    print(
        "\nBytes: a copy reads and writes its numbers once each; a pass of reorthogonalisation "
        "reads the basis\ntwice, and there are two passes a product."
    )


if __name__ == "__main__":
    main()
