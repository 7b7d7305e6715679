"""Networks to measure curvature on: made and trained here, with the truth about their spectra.

Five small ones, whose dense float64 Hessian is diagonalised, and four large ones, whose ends of the
spectrum a long float64 Lanczos run resolves. Everything comes from fixed seeds, scikit-learn's
digits and the text of Python's standard library. Nothing here uses dyndiag: the truth is reached by
a route of its own. What took long is kept in a folder, under a key of this file's own text.
"""

from __future__ import annotations

import copy
import sysconfig
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]
Product = Callable[[Tensor], Tensor]
LossFn = Callable[[nn.Module, Any], Tensor]

TOP = 10
"""Eigenvalues of each problem that are known exactly, at the least."""


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@dataclass(frozen=True, eq=False)
class Problem:
    """loss = loss_fn(model, batch) = criterion(model(inputs), targets): as each tool wants it."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def criterion(self) -> nn.Module:
        return nn.MSELoss() if self.targets.is_floating_point() else nn.CrossEntropyLoss()

    @property
    def loss_fn(self) -> LossFn:
        return squared_error if self.targets.is_floating_point() else cross_entropy

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    def loss(self) -> Tensor:
        return self.loss_fn(self.model, self.batch)

    def gradient(self) -> Tensor:
        """One forward and one backward pass: the unit of every cost."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(), self.parameters)])


@dataclass(frozen=True)
class Spectrum:
    """All that a Krylov method can see of a symmetric matrix from a start of known make.

    Eigenvalues come in groups that no product tells apart. The last array says how a unit gradient
    is spread over them.
    """

    values: Floats
    """(groups,), descending."""
    counts: Floats
    """(groups,): eigenvalues in each: a Gaussian start's weight is chi-squared of that many degrees
    (0: none of it; the gradient alone is there)."""
    gradient: Floats
    """(groups,): norm of the unit gradient's part in each."""
    size: int
    known: int
    """Leading groups that are single eigenvalues, known exactly; after them may come averages."""

    @property
    def top(self) -> Floats:
        return self.values[:TOP]

    @property
    def gap(self) -> float:
        """From the largest eigenvalue to the second, relative."""
        return float(1 - self.values[1] / self.values[0])

    @property
    def largest_in_magnitude(self) -> Floats:
        """What PyHessian's power iteration looks for."""
        order = np.argsort(-np.abs(self.values), kind="stable")
        return self.values[order[:TOP]]


# --- networks and data ---------------------------------------------------------------------------


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class Images(nn.Module):
    """8 × 8 images from rows of 64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, 8, 8)


def convolutions(*channels: int) -> nn.Module:
    layers: list[nn.Module] = [Images()]
    for before, after in pairwise((1, *channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], 10)
    )


class Block(nn.Module):
    """Pre-norm attention, written out so that every tool can differentiate it twice, and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        )
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Tokens (batch, length) → logits (batch · length, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.flatten(0, 1)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of scikit-learn's 1,797 images, standardised: (count, 64) and classes."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    return torch.tensor(images[:count], dtype=torch.float32), torch.tensor(classes[:count])


def text(vocabulary: int, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Excerpts of the standard library's source, (count, length), and each character's next, flat.

    The `vocabulary − 1` most frequent characters have a token each, all others share one.
    """
    library = Path(sysconfig.get_path("stdlib"))
    raw = b"".join(path.read_bytes() for path in sorted(library.glob("[a-d]*.py")))
    table = np.full(256, vocabulary - 1)
    for token, (character, _) in enumerate(Counter(raw).most_common(vocabulary - 1)):
        table[character] = token
    tokens = torch.from_numpy(table[np.frombuffer(raw, dtype=np.uint8)])
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - length - 1, (count,), generator=draw)
    rows = torch.stack([tokens[s : s + length + 1] for s in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].flatten()


# --- training ------------------------------------------------------------------------------------


def descend(problem: Problem, rate: float, steps: int) -> None:
    """Full-batch gradient descent."""
    with torch.no_grad():
        for _ in range(steps):
            with torch.enable_grad():
                gradients = torch.autograd.grad(problem.loss(), problem.parameters)
            for p, g in zip(problem.parameters, gradients, strict=True):
                p -= rate * g


def optimise(
    problem: Problem, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int
) -> None:
    """Batches of 64 examples (sequences: 16), drawn from a seed of their own."""
    inputs, targets = data
    each = len(targets) // len(inputs)
    draw = torch.Generator().manual_seed(1)
    problem.model.train()
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (16 if each > 1 else 64,), generator=draw)
        wanted = targets.view(len(inputs), each)[chosen].flatten()
        loss = problem.criterion(problem.model(inputs[chosen]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    problem.model.eval()


def at_the_edge(name: str, widths: tuple[int, ...], count: int, rate: float, steps: int) -> Problem:
    """Squared error by full-batch descent until the sharpness hovers about 2/rate."""
    x, y = digits(count)
    problem = Problem(name, mlp(*widths), x, F.one_hot(y, 10).float())
    descend(problem, rate, steps)
    return problem


def classified(name: str, model: nn.Module, count: int, steps: int) -> Problem:
    """Cross-entropy by SGD with momentum; curvature on `count` of the images trained on."""
    x, y = digits(1500)
    problem = Problem(name, model, x[:count], y[:count])
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    optimise(problem, sgd, (x, y), steps)
    return problem


def written(name: str, model: GPT, scale: float, rate: float, steps: int, count: int) -> Problem:
    """Next-character loss by AdamW, from weights of standard deviation `scale`; curvature on
    `count` of the excerpts trained on."""
    vocabulary, length = model.tokens.num_embeddings, model.places.num_embeddings
    inputs, targets = text(vocabulary, length, 512)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0, scale)
    problem = Problem(name, model, inputs[:count], targets[: count * length])
    adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    optimise(problem, adam, (inputs, targets), steps)
    return problem


def saddle() -> Problem:
    """A linear network close to zero weights, where eigenvalues come as ±s, each of them in
    a cluster as large as the hidden layer."""
    x, y = digits(256)
    model = nn.Sequential(nn.Linear(64, 6, bias=False), nn.Linear(6, 10, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p *= 1e-3
    return Problem("saddle", model, x, F.one_hot(y, 10).float() - 0.1)


SMALL: dict[str, Callable[[], Problem]] = {
    "mlp_ce": lambda: classified("mlp_ce", mlp(64, 16, 16, 10), 256, 300),
    "mlp_mse, edge": lambda: at_the_edge("mlp_mse, edge", (64, 16, 16, 10), 500, 2.0, 1200),
    "gpt": lambda: written("gpt", GPT(32, 16, 12, 2, 1), 0.1, 3e-3, 10, 16),
    "conv": lambda: classified("conv", convolutions(8, 8), 128, 200),
    "saddle": saddle,
}
# Scales, rates and steps are those of some hundred at which gap and what an oracle needs were
# nearest to earlier measurements of such problems.
LARGE: dict[str, Callable[[], Problem]] = {
    "mlp_mse 55k, edge": lambda: at_the_edge(
        "mlp_mse 55k, edge", (64, 200, 200, 10), 1000, 0.7, 200
    ),
    "mlp_ce 55k": lambda: classified("mlp_ce 55k", mlp(64, 200, 200, 10), 512, 1100),
    "gpt 0.5M": lambda: written("gpt 0.5M", GPT(128, 64, 100, 4, 4), 0.05, 3e-4, 2, 8),
    "conv 59k": lambda: classified("conv 59k", convolutions(32, 64, 64), 128, 20),
}
FIVE_THOUSAND = "mlp 5k"
"""5,018 parameters: for trace and density against the whole spectrum."""
OTHER_LENGTHS: dict[str, Callable[[], Problem]] = {
    **{
        f"mlp_mse 55k, {steps} steps": lambda steps=steps: at_the_edge(
            "mlp_mse 55k", (64, 200, 200, 10), 1000, 0.7, steps
        )
        for steps in (100, 400, 1000)
    },
    **{
        f"mlp_ce 55k, {steps} steps": lambda steps=steps: classified(
            "mlp_ce 55k", mlp(64, 200, 200, 10), 512, steps
        )
        for steps in (25, 200, 1000)
    },
    **{
        f"gpt 0.5M, {steps} steps": lambda steps=steps: written(
            "gpt 0.5M", GPT(128, 64, 100, 4, 4), 0.02, 1e-3, steps, 8
        )
        for steps in (2, 3, 10, 30, 100)
    },
    **{
        f"conv 59k, {steps} steps": lambda steps=steps: classified(
            "conv 59k", convolutions(32, 64, 64), 128, steps
        )
        for steps in (25, 200, 500)
    },
}
"""The large ones after other lengths; the GPTs from smaller weights, in longer steps."""
MAKERS = {
    **SMALL,
    **LARGE,
    **OTHER_LENGTHS,
    FIVE_THOUSAND: lambda: classified(FIVE_THOUSAND, mlp(64, 48, 32, 10), 512, 300),
}


# --- truth ---------------------------------------------------------------------------------------


def exact_product(problem: Problem) -> tuple[Product, Tensor]:
    """Float64 Hessian-vector products, and the gradient, of a float64 copy of the model."""
    model = copy.deepcopy(problem.model).double()
    x, y = (t.double() if t.is_floating_point() else t for t in problem.batch)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    gradient = torch.autograd.grad(problem.loss_fn(model, (x, y)), parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = [s.view_as(p) for s, p in zip(v.split(sizes), parameters, strict=True)]
        images = torch.autograd.grad(
            gradient, parameters, parts, retain_graph=True, materialize_grads=True
        )
        return torch.cat([i.flatten() for i in images])

    return product, torch.cat([g.detach().flatten() for g in gradient])


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """The Hessian and the gradient, float64."""
    product, gradient = exact_product(problem)
    rows = [product(e) for e in torch.eye(problem.size, dtype=torch.float64)]
    matrix = torch.stack(rows)
    return (matrix + matrix.T) / 2, gradient


def lanczos(
    product: Product, start: Tensor, most: int, enough: Callable[[Floats, Floats], bool]
) -> tuple[Floats, Floats, Floats, Tensor]:
    """(Ritz values ascending, T's eigenvectors, residuals, basis): as plain as can be, float64."""
    basis = torch.empty(most, len(start), dtype=torch.float64)
    basis[0] = start / start.norm()
    alpha: list[float] = []
    beta: list[float] = []
    while True:
        m = len(alpha) + 1
        w = product(basis[m - 1])
        alpha.append(float(w @ basis[m - 1]))
        for _ in range(2):
            w = w - basis[:m].T @ (basis[:m] @ w)
        values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
        beta.append(float(w.norm()))
        residuals = beta[-1] * np.abs(vectors[-1])
        if m == most or enough(values, residuals):
            return values, vectors, residuals, basis[:m]
        basis[m] = w / beta[-1]


FEWEST = 150
"""Steps of the run that finds a large problem's truth. Solvers may take as many on the spectrum
made of it: it has so many groups of eigenvalues, and then a Krylov space is exhausted."""


def resolved(values: Floats, residuals: Floats) -> bool:
    """The largest ten, and the ten largest in magnitude, to 1e-6 (their values: to far less)."""
    if len(values) < FEWEST:
        return False
    wanted = np.union1d(np.argsort(values)[-TOP:], np.argsort(np.abs(values))[-TOP:])
    return bool(np.all(residuals[wanted] <= 1e-6 * np.abs(values[wanted])))


def spectrum_of(problem: Problem) -> Spectrum:
    if problem.size <= 6000:
        matrix, gradient = dense(problem)
        if problem.size > 3000:  # the values alone, at a fifth of the time
            values = torch.linalg.eigvalsh(matrix).flip(0).numpy()
            return Spectrum(values, np.ones(problem.size), np.zeros(0), problem.size, problem.size)
        values, vectors = torch.linalg.eigh(matrix)
        parts = (vectors.T @ (gradient / gradient.norm())).abs().flip(0).numpy()
        return Spectrum(
            values.flip(0).numpy(), np.ones(problem.size), parts, problem.size, problem.size
        )

    product, gradient = exact_product(problem)
    gradient = gradient / gradient.norm()
    draw = torch.Generator().manual_seed(2)
    start = torch.randn(problem.size, generator=draw, dtype=torch.float64)
    values, vectors, residuals, basis = lanczos(product, start, 240, resolved)
    if not resolved(values, residuals):
        raise RuntimeError(f"{problem.name}: ten pairs are not resolved after {len(values)} steps")

    # Converged pairs stand alone. What is left is known through its moments: the quadrature of
    # a random start says how many eigenvalues are where, that of the gradient's rest where it lies.
    alone = residuals <= 1e-6 * np.abs(values).max()
    pairs = torch.from_numpy(vectors[:, alone].T.copy()) @ basis
    counts = vectors[0, ~alone] ** 2
    counts *= (problem.size - alone.sum()) / counts.sum()
    del basis
    parts = pairs @ gradient
    rest = gradient - pairs.T @ parts

    def on_the_rest(v: Tensor) -> Tensor:
        image = product(v)
        return image - pairs.T @ (pairs @ image)

    nodes, mixing, _, _ = lanczos(on_the_rest, rest, 40, lambda *_: False)
    weights = float(rest.norm()) * np.abs(mixing[0])
    kept = weights > 1e-6
    rows = np.concatenate(
        [
            np.stack((values[alone], np.ones(alone.sum()), parts.abs().numpy()), axis=1),
            np.stack((values[~alone], counts, np.zeros_like(counts)), axis=1),
            np.stack((nodes[kept], np.zeros(kept.sum()), weights[kept]), axis=1),
        ]
    )
    rows = rows[np.argsort(-rows[:, 0], kind="stable")]
    return Spectrum(rows[:, 0], rows[:, 1], rows[:, 2], problem.size, TOP)


# --- kept between runs ---------------------------------------------------------------------------


def load(name: str, folder: Path, say: Callable[[str], None]) -> tuple[Problem, Spectrum]:
    """The problem, trained, with its spectrum: from `folder`, or made now and put there."""
    key = zlib.crc32(Path(__file__).read_bytes() + torch.__version__.encode())
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{key:08x}.pt"
    if path.exists():
        problem, spectrum, _ = torch.load(path, weights_only=False)
        return problem, spectrum
    torch.manual_seed(0)
    began = time.perf_counter()
    problem = MAKERS[name]()
    problem.model.eval()
    trained = time.perf_counter()
    spectrum = spectrum_of(problem)
    found = time.perf_counter()
    say(
        f"{name}: {problem.size:,} parameters, loss {problem.loss().item():.3g}, trained in "
        f"{trained - began:.0f} s, truth in {found - trained:.0f} s, gap {spectrum.gap:.1%}, "
        f"top {np.array2string(spectrum.top[:4], precision=3)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save((problem, spectrum, key), path)
    return problem, spectrum


def load_all(
    names: list[str], folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[Problem, Spectrum]]:
    for name in names:
        yield load(name, folder, say)
