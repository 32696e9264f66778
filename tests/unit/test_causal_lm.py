"""causal_lm_loss against the composition that it replaces, in float64: shift, mean, output layer, metrics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import softmax_ext
from softmax_ext import causal_lm_loss

BATCH, POSITIONS, FEATURES, CLASSES = 3, 7, 5, 11


def problem(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(BATCH, POSITIONS, FEATURES, generator=generator, dtype=torch.float64)
    head = nn.Linear(FEATURES, CLASSES, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    labels = torch.randint(CLASSES, (BATCH, POSITIONS), generator=generator)
    labels[0, :3] = -100
    return hidden.to(dtype).requires_grad_(), head.to(dtype), labels


def expected(hidden, head, labels, *, shift=True, count=None, softcap=None, scale=1.0, z_loss=0.0, ignore_index=-100):
    """In torch's own operations, as transformers computes it; the z term is divided as the loss is."""
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows, target = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    live = target != ignore_index
    loss = F.cross_entropy(rows, target, ignore_index=ignore_index, reduction="sum")
    loss = loss + z_loss * rows.logsumexp(1)[live].square().sum()
    return loss / float(live.sum() if count is None else count)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": False},
        {"num_items_in_batch": 29},
        {"num_items_in_batch": torch.tensor(29)},
        {"num_items_in_batch": torch.tensor([29.0])},
        {"softcap": 2.0, "logit_scale": 0.5},
        {"z_loss": 0.1},
        {"memory": 100_000},
        {"return_stats": True},
    ],
    ids=str,
)
def test_it_is_the_composition(bias, options):
    hidden, head, labels = problem(bias=bias)
    found = causal_lm_loss(hidden, head, labels, **options)
    found = found[0] if options.get("return_stats") else found
    right = expected(
        hidden,
        head,
        labels,
        shift=options.get("shift", True),
        count=options.get("num_items_in_batch"),
        softcap=options.get("softcap"),
        scale=options.get("logit_scale", 1.0),
        z_loss=options.get("z_loss", 0.0),
    )
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    tensors = (hidden, *head.parameters())
    for ours, theirs in zip(gradients(found, *tensors), gradients(right, *tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_ignored_label_may_be_any_class():
    hidden, head, labels = problem()
    labels[labels == -100] = 4
    found = causal_lm_loss(hidden, head, labels, ignore_index=4)
    torch.testing.assert_close(found, expected(hidden, head, labels, ignore_index=4), rtol=1e-12, atol=0)


def test_labels_of_bytes():
    hidden, head, labels = problem()
    labels[labels == -100] = 0
    found = causal_lm_loss(hidden, head, labels.byte())
    assert torch.equal(found, causal_lm_loss(hidden, head, labels))


def test_all_labels_ignored_is_nan_as_torchs_mean():
    hidden, head, labels = problem()
    loss, stats = causal_lm_loss(hidden, head, torch.full_like(labels, -100), return_stats=True)
    assert loss.isnan()
    assert stats.token_accuracy.isnan()
    assert stats.token_count == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


@pytest.mark.parametrize("ignore_index", [-100, -1, 4])
def test_metrics(ignore_index):
    hidden, head, labels = problem()
    labels[labels == -100] = ignore_index
    _, stats = causal_lm_loss(hidden, head, labels, ignore_index=ignore_index, return_stats=True)
    logits, target = head(hidden)[:, :-1].detach(), labels[:, 1:]
    live = target != ignore_index
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert stats.token_count == live.sum()
    assert stats.token_accuracy.dtype == stats.mean_entropy.dtype == torch.float32
    torch.testing.assert_close(stats.token_accuracy, (logits.argmax(-1) == target)[live].float().mean())
    torch.testing.assert_close(stats.mean_entropy, entropy[live].mean().float())
    prediction = torch.where(live, logits.argmax(-1), -1)
    assert torch.equal(stats.positions.prediction[:, :-1], prediction)
    assert (stats.positions.prediction[:, -1] == -1).all()
    torch.testing.assert_close(stats.positions.entropy[:, :-1], torch.where(live, entropy, 0.0))


def test_metrics_have_no_derivative_and_cost_no_product():
    hidden, head, labels = problem()
    loss, stats = causal_lm_loss(hidden, head, labels, return_stats=True)
    assert not any(t.requires_grad for t in (stats.token_accuracy, stats.mean_entropy, *stats.positions))
    assert type(loss.grad_fn).__name__ == "EagerLinearCrossEntropyBackward"  # whose gradients are there already


def test_the_dtype_is_that_of_the_hidden_states_unless_another_is_asked_for():
    hidden, head, labels = problem(torch.bfloat16)
    assert causal_lm_loss(hidden, head, labels).dtype == torch.bfloat16
    assert causal_lm_loss(hidden, head, labels, dtype=torch.float32).dtype == torch.float32


def test_parameters_that_are_computed_count():
    hidden, head, labels = problem()
    torch.nn.utils.parametrizations.weight_norm(head)
    loss = causal_lm_loss(hidden, head, labels)
    torch.testing.assert_close(loss, expected(hidden, head, labels), rtol=1e-12, atol=0)
    assert all(g.any() for g in gradients(loss, *head.parameters()))


class _Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def _hooked(head, register):
    getattr(head, register)(lambda module, *args: None)
    return head


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (_Scaled(FEATURES, CLASSES, dtype=torch.float64), "_Scaled"),
        (nn.Sequential(nn.Linear(FEATURES, CLASSES)), "Sequential"),
        (_hooked(nn.Linear(FEATURES, CLASSES), "register_forward_hook"), "hooks"),
        (_hooked(nn.Linear(FEATURES, CLASSES), "register_forward_pre_hook"), "hooks"),
        (torch.zeros(CLASSES, FEATURES), "output layer"),
    ],
    ids=["subclass", "container", "hook", "pre-hook", "tensor"],
)
def test_another_layer_is_refused_by_name(head, text):
    hidden, _, labels = problem()
    with pytest.raises(TypeError, match=text) as error:
        causal_lm_loss(hidden, head, labels)
    assert str(error.value).startswith("causal_lm_loss: lm_head must be")


def test_a_forward_of_the_instance_is_refused():
    hidden, head, labels = problem()
    head.forward = lambda x: 2 * F.linear(x, head.weight)
    with pytest.raises(TypeError, match="forward of its own"):
        causal_lm_loss(hidden, head, labels)


def test_labels_of_another_shape_are_refused():
    hidden, head, labels = problem()
    with pytest.raises(RuntimeError, match=r"labels must have shape \[3, 7\]"):
        causal_lm_loss(hidden, head, labels[:, 1:])


@pytest.mark.parametrize("stats", [False, True])
def test_compiled(stats):
    hidden, head, labels = problem()

    def step(hidden, labels):
        found = causal_lm_loss(hidden, head, labels, return_stats=stats)
        return (found[0], found[1].token_accuracy) if stats else (found, None)

    torch._dynamo.reset()
    loss, accuracy = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, labels)
    right, right_accuracy = step(hidden, labels)
    torch.testing.assert_close(loss, right)
    if stats:
        torch.testing.assert_close(accuracy, right_accuracy)
    tensors = (hidden, *head.parameters())
    for ours, theirs in zip(gradients(loss, *tensors), gradients(right, *tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_derivatives():
    hidden, head, labels = problem()

    def loss(hidden, weight, bias):
        layer = copy.deepcopy(head)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return causal_lm_loss(hidden, layer, labels, num_items_in_batch=13)

    inputs = (hidden, *(p.detach().requires_grad_() for p in head.parameters()))
    torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(loss, inputs)


# ---- linear_cross_entropy(return_stats="detached"), which it rests on ----


def test_detached_statistics_are_the_statistics():
    hidden, head, labels = problem()
    arguments = (hidden, head.weight, labels)
    loss, stats = softmax_ext.linear_cross_entropy(*arguments, return_stats="detached")
    right, of_right = softmax_ext.linear_cross_entropy(*arguments, return_stats=True)
    torch.testing.assert_close(loss, right)
    for one, other in zip(stats, of_right, strict=True):
        torch.testing.assert_close(one, other.detach())
        assert not one.requires_grad
    for ours, theirs in zip(gradients(loss, *arguments[:2]), gradients(right, *arguments[:2]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_another_text_is_refused():
    hidden, head, labels = problem()
    with pytest.raises(ValueError, match='return_stats must be True, False or "detached"'):
        softmax_ext.linear_cross_entropy(hidden, head.weight, labels, return_stats="detach")
