"""Output layers within peft: LoRA adapters and modules_to_save count in causal_lm_loss, or are refused by name."""

import pytest
import torch
from torch import nn

from softmax_ext import causal_lm_loss

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model  # noqa: E402

FEATURES, CLASSES = 6, 11


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(FEATURES, FEATURES, dtype=dtype)
        self.lm_head = nn.Linear(FEATURES, CLASSES, dtype=dtype)

    def forward(self, x):
        return self.lm_head(self.body(x))


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, FEATURES, generator=generator).to(dtype)
    return hidden, torch.randint(CLASSES, (2, 9), generator=generator)


def adapted(dtype=torch.float32, **options):
    model = get_peft_model(Model(dtype), LoraConfig(r=3, lora_alpha=12, target_modules=["lm_head"], **options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins at 0
            nn.init.normal_(parameter)
    return model, model.base_model.model.lm_head


def both(head, dtype=torch.float32, **options):
    """(loss, gradients) of causal_lm_loss and of the cross entropy of ``head(hidden)``, dropout alike."""
    hidden, labels = problem(dtype)
    found = []
    for fused in (True, False):
        hidden = hidden.detach().requires_grad_()
        head.zero_grad()
        torch.manual_seed(4)
        if fused:
            loss = causal_lm_loss(hidden, head, labels, dtype=torch.float32, **options)
        else:
            logits = head(hidden)[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
        parameters = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
        found.append((loss.detach(), {**parameters, "hidden": hidden.grad}))
    return found


def assert_same(found, right, rtol=1e-5):
    torch.testing.assert_close(found[0], right[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == right[1].keys()
    for name, grad in right[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=rtol * grad.abs().max().item())


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("memory", [None, 100_000])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.4}, {"use_rslora": True}, {"lora_bias": True}], ids=lambda o: str(*o) or "plain"
)
def test_an_adapter_counts_and_is_trained(options, memory):
    _, head = adapted(**options)
    found, right = both(head, memory=memory)
    assert {"lora_A.default.weight", "lora_B.default.weight"} < found[1].keys()
    assert_same(found, right)


def test_without_its_adapter_the_loss_is_another():
    """What a loss of ``lm_head.weight`` would give."""
    _, head = adapted()
    hidden, labels = problem()
    alone = causal_lm_loss(hidden, head.base_layer, labels)
    assert (alone - causal_lm_loss(hidden, head, labels)).abs() > 0.1


def test_half_precision():
    _, head = adapted(torch.bfloat16)
    assert head.lora_A["default"].weight.dtype == torch.float32
    found, right = both(head, torch.bfloat16)
    assert_same(found, right, rtol=2e-2)


def test_several_adapters():
    model, head = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    found, right = both(head)
    assert "lora_B.other.weight" in found[1]
    assert_same(found, right)


@pytest.mark.parametrize("state", ["merged", "disabled", "disabled and merged"])
def test_an_adapter_that_is_merged_or_disabled(state):
    model, head = adapted()
    if "merged" in state:
        head.merge()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    assert_same(*both(head))


def test_modules_to_save():
    config = LoraConfig(r=3, target_modules=["body"], modules_to_save=["lm_head"])
    model = get_peft_model(Model(), config)
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    found, right = both(head)
    assert "modules_to_save.default.weight" in found[1]
    assert_same(found, right)
    with model.disable_adapter():
        hidden, labels = problem()
        loss = causal_lm_loss(hidden, head, labels)
        assert torch.equal(loss, causal_lm_loss(hidden, head.original_module, labels))


def test_a_variant_is_refused_by_name():
    _, head = adapted(use_dora=True)
    hidden, labels = problem()
    with pytest.raises(TypeError, match="DoraLinearVariant"):
        causal_lm_loss(hidden, head, labels)


def test_another_tuner_is_refused_by_name():
    model = get_peft_model(Model(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    hidden, labels = problem()
    with pytest.raises(TypeError, match="ia3"):
        causal_lm_loss(hidden, model.base_model.model.lm_head, labels)


# ---- within a model of transformers ----


@pytest.mark.parametrize("order", ["peft first", "apply first"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.2},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["adapter", "modules_to_save", "elsewhere"],
)
def test_a_model_of_transformers(order, config):
    transformers = pytest.importorskip("transformers", minversion="5")
    from softmax_ext.integrations import transformers as integration

    def step(integrated):
        torch.manual_seed(1)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).train()
        if integrated and order == "apply first":
            integration.apply(model, linear=True)
        model = get_peft_model(model, LoraConfig(r=3, **config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        if integrated and order == "peft first":
            integration.apply(model, linear=True)
        tokens = torch.randint(3, 97, (2, 12))
        outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        assert (outputs.logits is None) == integrated
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if integrated:
            integration.undo(model)
            assert model(input_ids=tokens, labels=tokens).logits is not None
        return outputs.loss.detach(), found

    assert_same(step(True), step(False))
