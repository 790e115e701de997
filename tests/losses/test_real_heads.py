"""Heads that scale or cap their logits, as those of Gemma, Cohere and Granite do.

The judges are the same steps in plain PyTorch, and models of transformers where that is installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Batch, Case, numbers
from tests.instruments import Operators
from tests.losses.test_dense import FLOATS, judge, tolerance
from tests.losses.test_linear import OF_LOGITS, D, V, factors, make_head, make_target
from xent_metrics import CrossEntropy, CrossEntropyReport, LinearLogits
from xent_metrics.functional import cross_entropy, per_target_losses

# Products of these are beyond the caps, so that the order of the steps, and each of them, decides what is read.
STEPS: dict[str, dict[str, float]] = {
    "scaled": {"scale": 0.0625},
    "capped": {"softcap": 3.0},
    "scaled and capped": {"scale": 0.4, "softcap": 2.0},
}
each_step = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """Make the logits of a head in plain PyTorch, in the dtype of its factors."""
    logits = F.linear(hidden, weight, bias) * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@each_step
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses_are_those_of_the_steps(dtype: torch.dtype, steps: dict[str, float]) -> None:
    """Equal to the steps in float64; in half precision to the steps as a model rounds them, each in its own dtype."""
    half = dtype in (torch.float16, torch.bfloat16)
    for bias, ignored, soft in itertools.product((False, True), (0.0, 0.4), (False, True)):
        hidden, head = (3 * torch.randn(3, 4, D)).to(dtype), make_head(dtype, bias)
        logits = plain(*(x if half or x is None else x.double() for x in (hidden, *head)), **steps)
        target = make_target(hidden.shape[:-1], soft, ignored)
        losses = per_target_losses(LinearLogits(hidden, *head, **steps), target)
        torch.testing.assert_close(losses, judge(logits, target, -1), **tolerance(dtype))


def uncapped(logits: Tensor) -> LinearLogits:
    """Return a head that scales and caps, and what has to go into it to get some logits."""
    steps = {"scale": 0.25, "softcap": 50.0}
    assert logits.abs().max() < 50
    plain = factors(50 * torch.atanh(logits / 50) / 0.25)
    return LinearLogits(plain.hidden, plain.weight, plain.bias, **steps)


@pytest.mark.parametrize("case", OF_LOGITS.values(), ids=OF_LOGITS)
def test_every_metric(case: Case) -> None:
    """Every metric of logits, with whatever options, reads what the independent judge reads."""

    def factorize(batch: Batch) -> Batch:
        return {name: uncapped(x) if name.startswith("preds") else x for name, x in batch.items()}

    batches = case.batches()
    expected = pytest.approx(numbers(case.expected(*batches)), rel=1e-9, abs=1e-9, nan_ok=True)
    assert numbers(case.filled(*map(factorize, batches)).compute()) == expected


@each_step
@pytest.mark.usefixtures("hidden_values")
def test_values_where_nothing_is_looked_at(steps: dict[str, float]) -> None:
    """The same, shifted, where the host would have to wait to know more."""
    hidden, head = 3 * torch.randn(3, 5, D), make_head()
    target = make_target(torch.Size((3, 5)), False, 0.4)
    logits = plain(*(x if x is None else x.double() for x in (hidden, *head)), **steps)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()).item()
    value = cross_entropy(LinearLogits(hidden, *head, **steps), target, shift=True)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_autocast_rounds_the_steps_as_the_model_does() -> None:
    """A head's logits are in autocast's dtype, and what is done to them stays in it."""
    hidden, (weight, bias) = 3 * torch.randn(4, 6, D), make_head()
    target = torch.randint(0, V, (4, 6))
    for steps in STEPS.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = plain(hidden, weight, bias, **steps)
            losses = per_target_losses(LinearLogits(hidden, weight, bias, **steps), target)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(losses, judge(logits, target, -1), rtol=1e-6, atol=1e-6)


def test_heads_without_steps_do_nothing_more(operators: Operators) -> None:
    """The logits are written by the matmul, and neither scaled nor capped; a cap costs three operators a block."""
    hidden, head, target = torch.randn(600, D), make_head(), torch.randint(0, V, (600,))
    counts = []
    for steps in ({}, {"scale": 2.0}, {"softcap": 2.0}, {"scale": 2.0, "softcap": 2.0}):
        preds, metric = LinearLogits(hidden, *head, **steps), CrossEntropy()
        metric.update(preds, target)
        operators.counts.clear()
        with operators:
            metric.update(preds, target)
        counts.append(operators.counts.total())
    assert [count - counts[0] for count in counts] == [0, 2, 6, 8]  # Of two blocks.


@pytest.mark.parametrize("shape", [(3, 700, D), (0, D)])
def test_an_update_never_waits(shape: tuple[int, ...]) -> None:
    """On a device without data, where looking at a value is impossible, an update runs."""
    factors = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in (shape, (V, D), (V,)))
    target = torch.empty(shape[:-1], device="meta", dtype=torch.int64)
    CrossEntropyReport().to("meta").update(LinearLogits(*factors, scale=0.5, softcap=30.0), target)


def test_steps_need_no_memory(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """They are made where the products are, of which 63 MiB are there at a time."""
    hidden, weight = torch.randn(512, 8), torch.randn(64000, 8)
    preds, target = LinearLogits(hidden, weight, scale=0.5, softcap=30.0), torch.randint(0, 64000, (512,))
    assert peak_bytes(lambda: cross_entropy(preds, target)) <= 66 * 2**20


# Models of transformers, small and random.


SIZES = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 2.0, "attn_implementation": "eager",
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, float]]]] = {
    "Gemma2": ({"final_logit_softcapping": 5.0}, lambda config: {"softcap": config.final_logit_softcapping}),
    "Cohere": ({"logit_scale": 0.0625}, lambda config: {"scale": config.logit_scale}),
    "Granite": ({"logits_scaling": 8.0}, lambda config: {"scale": 1 / config.logits_scaling}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, dtype: torch.dtype) -> None:
    """The losses of a model's logits are those of its hidden states and head; without its step they are far off."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, which is no dependency")
    own, steps_of = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**SIZES, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        logits = model(ids).logits
        hidden = model.model(ids).last_hidden_state
    weight, target = model.lm_head.weight, ids.roll(-1, 1)
    losses = per_target_losses(LinearLogits(hidden, weight, **steps_of(config)), target)
    torch.testing.assert_close(losses, judge(logits, target, -1), rtol=1e-6, atol=1e-6)
    without = per_target_losses(LinearLogits(hidden, weight), target)
    assert (without - losses).mean() > 1
