"""Ways to train a few rows of the embedding of a causal language model, and what they must arrive at.

Weight decay is off and eps is 1e-12 everywhere, so that optimizers which lack the one and place the other differently
can be held to the same result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekernels as sk

from .kernels.case import WrongResult
from .timing import DEVICE

LR, EPS = 1e-3, 1e-12
CHECKED = 3  # steps before the comparison: enough to show a stale weight, moment or step count
TOLERANCE = 1e-3  # |found - expected| / |expected - start|, norms over all rows
OURS = "train_only + SparseAdamW"
TOKENS = "peft TrainableTokens, AdamW(fused)"
HAND = "compact AdamW(fused) + index_copy_"
DENSE = "AdamW(fused)"
SPARSE = "SparseAdam, Embedding(sparse=True); untied"
SHIRA = "peft SHiRA, AdamW(fused); head only"


@dataclass(frozen=True)
class Task:
    """A model with a tied embedding, the rows to train, and a few batches of ids [B, T] in which all of them occur."""

    model: nn.Module
    rows: Tensor
    batches: list[Tensor]

    @property
    def table(self) -> nn.Parameter:
        return embedding(self.model).weight

    @property
    def table_bytes(self) -> int:
        return self.table.numel() * self.table.element_size()

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class Contender:
    """A model under training.

    Attributes:
        update: the optimizer's step and what belongs to it; takes the gradients away afterwards.
        trained: the current values of the rows.
        table: the table that forward reads outside of the rows, or None where other rows are trained as well.
    """

    model: nn.Module
    update: Callable[[], None]
    trained: Callable[[], Tensor]
    table: Callable[[], Tensor] | None = None

    def loss(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    def step(self, ids: Tensor) -> None:
        self.loss(ids).backward()
        self.update()


@dataclass(frozen=True)
class Kind:
    """How a contender comes about, and what it must compute: `steps` steps on rows whose gradient has these sources."""

    make: Callable[[nn.Module, Tensor], Contender]
    trains: str
    steps: int = CHECKED
    lookups: bool = True
    head: bool = True


def make_task(small: bool) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary, width, shape = (800, 128, (2, 40)) if small else (32_000, 1024, (2, 128))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    rows = torch.randperm(vocabulary, device=DEVICE)[:18].sort().values
    batches = [torch.randint(vocabulary, shape, device=DEVICE) for _ in range(CHECKED)]
    for ids in batches:  # a quarter of the tokens, so that each row is looked up, and predicted, several times
        places = torch.randperm(ids.numel(), device=DEVICE)[: ids.numel() // 4]
        ids.view(-1)[places] = rows.repeat(len(places) // len(rows) + 1)[: len(places)]
    return Task(model, rows, batches)


def embedding(model: Any) -> nn.Embedding:
    found = model.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


def stepped(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def fused(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, LR, eps=EPS, weight_decay=0.0, fused=True)


def frozen(model: nn.Module, rows: Tensor) -> Contender:
    """The model's own share of a step: forward, and backward down to what the embedding put out. Trains nothing."""
    model.requires_grad_(False)
    model.enable_input_require_grads()  # type: ignore[operator]
    table = embedding(model).weight
    return Contender(model, lambda: None, lambda: table[rows], lambda: table)


def train_only(model: nn.Module, rows: Tensor) -> Contender:
    table = embedding(model).weight
    index = sk.Index(rows, table.shape, granularity="row")
    tuned = sk.train_only(model, sk.Selection({"model.embed_tokens.weight": index}))
    optimizer = sk.SparseAdamW(tuned.parameters(), LR, eps=EPS, weight_decay=0.0)
    return Contender(model, stepped(optimizer), lambda: table[rows], lambda: table)


def trainable_tokens(model: nn.Module, rows: Tensor) -> Contender:
    from peft import TrainableTokensConfig, get_peft_model

    table = embedding(model).weight
    peft = get_peft_model(model, TrainableTokensConfig(token_indices=rows.tolist()))  # type: ignore[arg-type]
    (values,) = trainable(peft)
    return Contender(peft, stepped(fused([values])), lambda: values, lambda: table)


def by_hand(model: nn.Module, rows: Tensor) -> Contender:
    """What a user writes without a package: the gradient of the whole table, but state and step of the rows alone."""
    table = only_table(model)
    values = nn.Parameter(table.detach()[rows])
    optimizer = fused([values])

    @torch.no_grad()
    def update() -> None:
        assert table.grad is not None
        values.grad, table.grad = table.grad.index_select(0, rows), None
        optimizer.step()
        table.index_copy_(0, rows, values)

    return Contender(model, update, lambda: table[rows], lambda: table)


def dense(model: nn.Module, rows: Tensor) -> Contender:
    table = only_table(model)
    return Contender(model, stepped(fused([table])), lambda: table[rows])


def sparse_adam(model: nn.Module, rows: Tensor) -> Contender:
    """With a head of its own, which stays frozen: the gradient of a tied table is dense, and SparseAdam refuses it."""
    table = only_table(model)
    model.lm_head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)  # type: ignore[union-attr]
    embedding(model).sparse = True
    return Contender(model, stepped(torch.optim.SparseAdam([table], LR, eps=EPS)), lambda: table[rows])


def shira(model: nn.Module, rows: Tensor) -> Contender:
    """With as many elements as its least rank demands: the rows' and then others. Lookups read the frozen table.

    Its backward could end at the head; it goes on to what the embedding put out, as it does for everybody else here.
    """
    model.enable_input_require_grads()  # type: ignore[operator]
    table = embedding(model).weight
    width = table.shape[1]
    rank = -(-len(rows) * width // sum(table.shape))
    size = rank * sum(table.shape)
    start = table.detach()[rows]
    others = torch.ones(table.shape[0], dtype=torch.bool, device=table.device)
    others[rows] = False
    chosen = torch.cat([rows, others.nonzero().view(-1)])
    mask = torch.zeros_like(table)
    mask[chosen[: size // width]] = 1
    mask[chosen[size // width], : size % width] = 1
    peft = shira_on(model, "lm_head", mask, rank)
    (values,) = trainable(peft)
    places = mask.nonzero()
    mine = torch.isin(places[:, 0], rows)  # ordered by row, as the rows are
    return Contender(peft, stepped(fused([values])), lambda: start + values.detach()[mine].view(start.shape))


def shira_on(model: nn.Module, target: str, mask: Tensor, rank: int = 1) -> nn.Module:
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=rank, target_modules=[target])
    config.mask_fn = lambda base_layer, r, **_: mask
    return get_peft_model(model, config)  # type: ignore[arg-type]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def only_table(model: nn.Module) -> nn.Parameter:
    model.requires_grad_(False)
    return embedding(model).weight.requires_grad_(True)  # type: ignore[return-value]


KINDS = {
    OURS: Kind(train_only, "the rows"),
    TOKENS: Kind(trainable_tokens, "the rows"),
    HAND: Kind(by_hand, "the rows"),
    # From the second step on these train something else, so the first is what can be compared.
    DENSE: Kind(dense, "every row", steps=1),
    SPARSE: Kind(sparse_adam, "every row looked up; not the head", steps=1, head=False),
    SHIRA: Kind(shira, "elements of the head; not what is looked up", steps=1, lookups=False),
}


def expected(task: Task, kind: Kind) -> Tensor:
    """The rows after the steps of `kind`, from dense gradients of an untied model in fp64."""
    model = task.copy().double()
    read = only_table(model)
    head = nn.Parameter(read.detach().clone())
    model.lm_head.weight = head  # type: ignore[union-attr]
    values = nn.Parameter(read.detach()[task.rows])
    optimizer = torch.optim.AdamW([values], LR, eps=EPS, weight_decay=0.0, foreach=False)
    for ids in task.batches[: kind.steps]:
        logits = model(input_ids=ids, use_cache=False).logits  # the model's own loss would round them to fp32
        grads = torch.autograd.grad(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), [read, head])
        used = zip(grads, (kind.lookups, kind.head), strict=True)
        values.grad = sum((grad[task.rows] for grad, counts in used if counts), torch.zeros_like(values))
        optimizer.step()
        with torch.no_grad():
            for weight in (read, head):
                weight.index_copy_(0, task.rows, values)
    return values.detach()


def check(task: Task, name: str, kind: Kind, wanted: Tensor) -> float:
    """The error of a contender's rows against those `expected`, relative to how far they moved.

    Raises:
        WrongResult: the rows are elsewhere, or a row that was not selected has changed.
    """
    contender = kind.make(task.copy(), task.rows)
    for ids in task.batches[: kind.steps]:
        contender.step(ids)
    start = task.table.detach()
    found = contender.trained().detach().double()
    error = float((found - wanted).norm() / (wanted - start[task.rows]).norm())
    if not error <= TOLERANCE:  # written so that NaN fails
        raise WrongResult(f"{name}: rows are {error:.3g} of their way off, allowed is {TOLERANCE:g}; it gets no time")
    if contender.table is not None:
        others = contender.table().detach().clone()
        others[task.rows] = start[task.rows]
        if not torch.equal(others, start):
            raise WrongResult(f"{name} changed rows that were not selected; it gets no time")
    return error


def refusals(task: Task) -> dict[str, str]:
    """What cannot be had, in the words of those who refuse it."""
    rows = torch.zeros_like(task.table)
    rows[task.rows] = 1

    def tied() -> None:
        model = task.copy()
        table = only_table(model)
        embedding(model).sparse = True
        Contender(model, stepped(torch.optim.SparseAdam([table], LR)), lambda: table).step(task.batches[0])

    attempts: dict[str, Callable[[], Any]] = {
        "SHiRA on an Embedding": lambda: shira_on(task.copy(), "embed_tokens", rows),
        f"SHiRA with these {len(task.rows)} rows of the head": lambda: shira_on(task.copy(), "lm_head", rows),
        "SparseAdam with tied weights": tied,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            raise WrongResult(f"{name} is no longer refused: it has to be measured")
    return found
