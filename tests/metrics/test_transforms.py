"""Where tensors stand for others, as inside the transforms of `torch.func`, values are what they are elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from tests.cases import FORMS, Case, Form, K, bits
from tests.metrics.conformance import each_case
from xent_metrics import CrossEntropy, LinearLogits, Tally, functional
from xent_metrics.metrics.transforms import outside_transforms

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
Tensors = list[Tensor]


def tensors(value: Any) -> Tensors:
    """List the tensors of a value."""
    if isinstance(value, dict):
        return [*value.values()]
    return [value.state if isinstance(value, Tally) else value]


def is_float(x: Any) -> bool:
    """Return whether a value is a tensor that a derivative could be taken of."""
    return isinstance(x, Tensor) and x.is_floating_point()


def inside_grad(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it beside what is differentiated."""
    return grad(lambda x: (x.sum(), call(x)), has_aux=True)(x)[1]


def inside_jvp(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it inside a derivative along a direction, which is 0."""
    values, derivatives = jvp(call, (x,), (x,))
    assert not any(derivative.any() for derivative in derivatives)
    return values


def with_duals(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it with numbers that have a derivative."""
    with forward_ad.dual_level():
        values = call(forward_ad.make_dual(x, x))
        assert not any(forward_ad.unpack_dual(value).tangent is not None for value in values)
    return values


def inside_vmap(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it for two examples, of which the second is the other way round."""
    pairs = torch.stack([x, x.flip(0)], -1)
    values = vmap(call, in_dims=-1)(pairs)
    assert [bits(value[1]) for value in values] == [bits(value) for value in call(pairs[..., 1])]
    return [value[0] for value in values]


def inside_both(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it beside the gradients of examples."""
    return [value[1] for value in vmap(lambda x: inside_grad(call, x))(x.expand(2, *x.shape))]


def negated(call: Callable[[Tensor], Tensors], x: Tensor) -> Tensors:
    """Call it with a view of the negative numbers."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return call(view)


EACH_WAY = [inside_grad, inside_jvp, with_duals, inside_vmap, inside_both, negated]


@each_form
def test_functions(form: Form) -> None:
    """Whichever tensor stands for another, the value has the bits of the same call elsewhere, and no derivative."""
    batch = form.batches()[0]
    expected = [bits(x) for x in tensors(form.function(**batch, **form.options))]
    for name in filter(lambda name: is_float(batch[name]), batch):

        def call(x: Tensor, name: str = name) -> Tensors:
            return tensors(form.function(**{**batch, name: x}, **form.options))

        for way in EACH_WAY:
            assert [bits(x) for x in way(call, batch[name])] == expected, (way, name)


@pytest.mark.parametrize("way", EACH_WAY)
def test_large_batches(way: Callable[..., Tensors]) -> None:
    """Nor are the buffers in the way: of long rows, of ignored ones, of many targets, of logits that are not there."""
    target = torch.randint(0, 200, (700,)).masked_fill(torch.arange(700) % 2 == 0, -100)
    logits, head = torch.randn(700, 200), torch.randn(200, 8)
    for call, x in (
        (lambda x: [functional.cross_entropy(x, target, label_smoothing=0.1)], logits),
        (lambda x: [functional.cross_entropy(x, x.softmax(-1))], logits),
        (lambda x: [functional.normalized_cross_entropy(x, target, num_classes=200)], logits),
        (lambda x: [functional.cross_entropy(LinearLogits(x, head), target)], logits[:, :8]),
        (lambda x: [functional.cross_entropy(LinearLogits(x, head, scale=3.0, softcap=0.5), target)], logits[:, :8]),
        (lambda x: [functional.cross_entropy(LinearLogits(logits[:, :8], x), target.clamp(max=7))], head),
    ):
        assert [bits(value) for value in way(call, x)] == [bits(value) for value in call(x)]


@each_case
def test_metrics(case: Case) -> None:
    """A metric adds the batch, or each example of it, and keeps no tensor that stands for another."""
    batch, name = case.batches(weighed=True)[2], case.quantity.positional[0]
    pairs = torch.stack([batch[name], batch[name].flip(0)])
    batches = [{**batch, name: x} for x in pairs]
    expected = [tensors(case.metric()(**x)) for x in batches]
    metric = case.metric()

    def step(x: Tensor) -> Tensors:
        metric.update(**{**batch, name: x})
        return tensors(metric(**{**batch, name: x}))

    values = inside_grad(step, batch[name])
    assert [bits(x) for x in values] == [bits(x) for x in expected[0]]
    assert metric.update_count == 2
    assert bits(pickle.loads(pickle.dumps(metric)).compute()) == bits(case.filled(batches[0], batches[0]).compute())
    metric.reset()
    values = vmap(step)(pairs)
    for i in range(2):
        assert [bits(x[i]) for x in values] == [bits(x) for x in expected[i]]
    assert metric.update_count == 4
    assert bits(metric.compute()) == bits(case.filled(*batches, *batches).compute())


def test_derivatives_are_zero() -> None:
    """In both modes, as of any constant."""
    preds, target = torch.randn(4, K), torch.randint(0, K, (4,))
    for function in (functional.perplexity, functional.per_target_losses):
        for jacobian in (jacrev, jacfwd):
            derivative = jacobian(partial(function, target=target))(preds)
            assert derivative.shape[-2:] == preds.shape
            assert not derivative.any()


def test_numbers_are_stacked_too() -> None:
    """A metric of one's own may return them."""
    x = torch.randn(3, K)
    add = outside_transforms(lambda x: (x.sum().item(), None))
    assert torch.equal(vmap(lambda x: add(x)[0])(x), x.sum(1))


def test_a_training_step_of_an_ensemble() -> None:
    """The gradient is that of the loss alone, and the metric reads the losses of all models."""
    metric = CrossEntropy()
    models = [nn.Linear(3, K) for _ in range(4)]
    weights, _ = stack_module_state(models)
    inputs, target = torch.randn(5, 3), torch.randint(0, K, (5,))

    def loss(weights: Any, measured: bool) -> Tensor:
        logits = functional_call(models[0], weights, (inputs,))
        if measured:
            metric.update(logits, target)
        return nn.functional.cross_entropy(logits, target)

    gradients, without = (vmap(grad(loss), in_dims=(0, None))(weights, measured) for measured in (True, False))
    assert all(torch.equal(gradients[name], without[name]) for name in without)
    losses = [nn.functional.cross_entropy(model(inputs), target).item() for model in models]
    assert metric.compute().item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_a_tensor_that_outlived_its_transform() -> None:
    """It is read as any other."""
    target, kept = torch.randint(0, K, (4,)), []
    grad(lambda x: kept.append(2 * x) or x.sum())(torch.randn(4, K))
    metric = CrossEntropy()
    metric.update(kept[0], target)
    assert bits(pickle.loads(pickle.dumps(metric)).compute()) == bits(functional.cross_entropy(kept[0], target))


def test_mistakes() -> None:
    """One raises as elsewhere, and an empty ensemble has no value."""
    preds, target = torch.randn(2, 4, K), torch.tensor([[0, 1, 2, 3], [0, 1, 2, K]])
    metric = CrossEntropy()
    with pytest.raises(ValueError, match=rf"^`target` must hold class indices in \[0, {K}\)"):
        vmap(metric.update)(preds, target)
    assert metric.update_count == 1
    with pytest.raises(ValueError, match=r"^`preds` must not be those of no example inside torch\.func\.vmap"):
        vmap(functional.perplexity)(preds[:0], target[:0])
