"""transformers' own models, tiny and random, with this package's loss beside their own: values, gradients, undoing."""

import copy
import operator
import pickle
import socket
import threading
import warnings

import processes
import pytest
import torch

import softmax_ext

transformers = pytest.importorskip("transformers", minversion="5")
import data_parallel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from softmax_ext.integrations import transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "Llama": (transformers.LlamaConfig, GROUPED),
    "Qwen2": (transformers.Qwen2Config, GROUPED),
    "Qwen3": (transformers.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "Mistral": (transformers.MistralConfig, GROUPED),
    "Mixtral": (transformers.MixtralConfig, {**GROUPED, "num_local_experts": 2, "output_router_logits": True}),
    "Gemma2": (transformers.Gemma2Config, {**GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "Gemma3": (transformers.Gemma3TextConfig, {**GROUPED, "head_dim": 8, "final_logit_softcapping": 4.0}),
    "Phi3": (transformers.Phi3Config, GROUPED),
    "GPT2": (transformers.GPT2Config, {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPTNeoX": (transformers.GPTNeoXConfig, SIZES),
    "OLMo": (transformers.OlmoConfig, GROUPED),
    "OLMo2": (transformers.Olmo2Config, GROUPED),
    "Granite": (transformers.GraniteConfig, {**GROUPED, "logits_scaling": 3.0}),
    "Cohere": (transformers.CohereConfig, {**GROUPED, "logit_scale": 0.25}),
}


def model_of(name="Llama", dtype=torch.float32, **changes):
    torch.manual_seed(1)
    kind, sizes = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes})).to(dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # so that the classes differ
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 97, (2, 12), generator=generator)
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, **inputs):
    """(outputs, gradients by name) of one forward and backward."""
    model.zero_grad()
    outputs = model(**{**batch(), **inputs})
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, {name.replace("_orig_mod.", "").replace("module.", ""): grad for name, grad in found.items()}


def assert_same(found, right, rtol=1e-5):
    """The losses, and each gradient within ``rtol`` of the largest gradient."""
    torch.testing.assert_close(found[0].loss, right[0].loss, rtol=rtol, atol=0)
    assert found[1].keys() == right[1].keys()
    largest = max(grad.abs().max().item() for grad in right[1].values())
    for name, grad in right[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: n + m)


@pytest.fixture(autouse=True)
def _logits_are_not_made():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="softmax_ext: the model uses its logits")
        yield


# ---- causal language models ----


@pytest.mark.parametrize("inputs", [{}, {"num_items_in_batch": 37}, {"num_items_in_batch": torch.tensor(37)}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_architecture(name, inputs):
    model = model_of(name)
    right = step(model, **inputs)
    assert_same(step(integration.apply(model), **inputs), right)
    found = step(integration.apply(model, linear=True), **inputs)
    assert found[0].logits is None
    assert_same(found, right)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_half_precision(name):
    """Against the loss of the same bfloat16 hidden states in double: theirs rounds the logits up to four times."""
    model = model_of(name, torch.bfloat16)
    head = copy.deepcopy(model).double().lm_head
    hidden = model(**batch(), output_hidden_states=True).hidden_states[-1].double()
    scale = {"Cohere": 0.25, "Granite": 1 / 3}.get(name, 1.0)
    options = {"logit_scale": scale, "softcap": 3.0 if name == "Gemma2" else None}
    right = softmax_ext.causal_lm_loss(hidden, head, batch()["labels"], **options).float()
    theirs = model(**batch()).loss
    exact = integration.apply(model, linear=True, logits_dtype=torch.float32)(**batch()).loss
    torch.testing.assert_close(exact, right, rtol=2e-6, atol=0)
    assert (theirs - right).abs() > 10 * (exact - right).abs()
    for linear in (False, True):
        loss = integration.apply(model, linear=linear)(**batch()).loss
        assert loss.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(loss, right, rtol=1e-3, atol=0)


def test_given_shift_labels_are_not_shifted():
    labels = batch()["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    model = model_of()
    right = step(model)
    for linear in (False, True):
        integration.apply(model, linear=linear)
        assert_same(step(model, shift_labels=shifted, labels=torch.zeros_like(labels)), right)


def test_outputs_keep_their_form():
    model = integration.apply(model_of(), linear=True)
    outputs = model(**batch(), output_hidden_states=True)
    assert type(outputs).__name__ == "CausalLMOutputWithPast"
    assert outputs.logits is None
    assert len(outputs.hidden_states) == 3
    loss, logits, *_ = model(**batch(), return_dict=False)
    assert logits is None
    assert torch.equal(loss, outputs.loss)


def test_logits_are_made_on_request_and_in_eval_and_without_labels():
    model = model_of()
    right = model(**batch())
    integration.apply(model, linear=True)
    assert torch.equal(model(**batch(), output_logits=True).logits, right.logits)
    assert torch.equal(model(input_ids=batch()["input_ids"]).logits, right.logits)
    torch.testing.assert_close(model.eval()(**batch()).logits, right.logits)
    generated = model.generate(batch()["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(
        generated, integration.undo(model).generate(batch()["input_ids"], max_new_tokens=3, do_sample=False)
    )


def test_undo_leaves_nothing():
    model = model_of()
    right, before = step(model), (type(model), type(model.lm_head), dict(vars(model)))
    integration.undo(integration.apply(model, linear=True))
    assert (type(model), type(model.lm_head), dict(vars(model))) == before
    found = step(model)
    assert torch.equal(found[0].loss, right[0].loss)
    assert torch.equal(found[0].logits, right[0].logits)


def test_other_instances_are_left_alone():
    other = model_of()
    right = step(other)
    integration.apply(model_of(), linear=True)
    assert torch.equal(step(other)[0].loss, right[0].loss)
    assert other.loss_function is transformers.loss.loss_utils.ForCausalLMLoss


def test_options_reach_the_loss():
    model = model_of()
    logits, labels = model(**batch()).logits, batch()["labels"]
    rows, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    options = {"label_smoothing": 0.2, "z_loss": 0.1}
    right = softmax_ext.cross_entropy(rows, target, **options)
    for more in ({}, {"precompute_grad": True}, {"linear": True}, {"linear": True, "memory": 60_000}):
        integration.apply(model, **options, **more)
        torch.testing.assert_close(model(**batch()).loss, right)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how, tmp_path):
    model = model_of()
    right = step(model)
    integration.apply(model, linear=True)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        model.save_pretrained(tmp_path)
        other = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        assert other.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = step(other)
    assert (found[0].logits is None) == (how != "save")
    assert_same(found, right)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tied_weights_and_gradient_checkpointing():
    model = model_of(tie_word_embeddings=True)
    right = step(model)
    integration.apply(model, linear=True)
    assert_same(step(model), right)
    model.gradient_checkpointing_enable()
    assert_same(step(model), right)


def test_a_bias_of_the_output_layer():
    model = model_of()
    model.lm_head = torch.nn.Linear(32, 97)
    right = step(model)
    assert "lm_head.bias" in right[1]
    assert_same(step(integration.apply(model, linear=True)), right)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_compiled(name, dynamic):
    model = model_of(name)
    right = step(model)
    for linear in (False, True):
        torch._dynamo.reset()
        integration.apply(model, linear=linear)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        found = step(compiled)
        assert (found[0].logits is None) == linear
        assert_same(found, right)


@pytest.mark.parametrize("loss", ["logits", "linear"])
def test_distributed_data_parallel(loss):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = processes.started(data_parallel.__file__, str(port), loss)
    assert "the gradients are the mean" in result.stdout, result.stderr


# ---- other models ----


def test_masked_language_model():
    torch.manual_seed(1)
    config = transformers.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, decoder_bias=True)
    model = transformers.ModernBertForMaskedLM(config).train()
    right = step(model)
    assert_same(step(integration.apply(model)), right)
    found = step(integration.apply(model, linear=True))
    assert found[0].logits is None
    assert_same(found, right)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_classification(name):
    torch.manual_seed(1)
    model = getattr(transformers, name)(transformers.LlamaConfig(**GROUPED, num_labels=5)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = torch.tensor([3, 1]) if "Sequence" in name else batch()["labels"] % 5
    right = step(model, labels=labels)
    assert_same(step(integration.apply(model), labels=labels), right)
    with pytest.raises(ValueError, match="linear must be False with a classifier"):
        integration.apply(model, linear=True)
    assert_same(step(integration.undo(model), labels=labels), right)


@pytest.mark.parametrize("labels", [torch.tensor([[0.5], [2.0]]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])])
def test_regression_and_several_labels_stay_theirs(labels):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**GROUPED, num_labels=labels.shape[1])
    model = transformers.LlamaForSequenceClassification(config).train()
    right = step(model, labels=labels)
    assert_same(step(integration.apply(model), labels=labels), right, rtol=0)


# ---- what the model does with its logits in between ----


class _Sliced(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = (2 * logits.float())[..., :90]
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=90)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class _CappedTwice(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = torch.tanh(torch.tanh(logits / 5) * 5 * 0.3) * 2
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=97)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class _Shifted(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = -(1.0 - (logits + logits.mean(-1, keepdim=True))) - 1
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=97)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", [_Sliced, _CappedTwice, _Shifted])
def test_logits_that_the_model_uses_are_made_with_a_warning(kind):
    torch.manual_seed(1)
    model = kind(transformers.LlamaConfig(**GROUPED)).train()
    tokens = batch()["input_ids"] % 90
    right = step(model, input_ids=tokens, labels=tokens)
    integration.apply(model, linear=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = step(model, input_ids=tokens, labels=tokens)
    assert any(
        "the model uses its logits between the output layer (Linear) and the loss" in str(w.message) for w in caught
    )
    assert_same(found, right)


OPERATIONS = {
    "item assignment": lambda z: z.__setitem__((..., slice(5)), -1.0) or z,
    "power": lambda z: z**2,
    "reflected": lambda z: 1 / (3 + z * z),
    "difference": lambda z: 1 - z,
    "comparison": lambda z: z * (z > 0),
    "absolute value": lambda z: abs(z),
    "stack": lambda z: torch.stack([z, 2 * z]).sum(0),
    "where": lambda z: torch.where(z > 0, z, 0.5 * z),
    "a cap of the other sign": lambda z: torch.tanh(z / 3) * -3,
    "a tensor as factor": lambda z: z * torch.tensor(2.0),
    "matmul": lambda z: z @ torch.eye(97),
    "rows": lambda z: torch.stack(list(z)),
    "method": lambda z: z.clamp(-1, 1),
    "in place": lambda z: z.mul_(0.5),
    "augmented": lambda z: operator.imul(z, 0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_on_the_logits_is_the_models_own(name):
    class Model(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = OPERATIONS[name](self.lm_head(self.model(input_ids).last_hidden_state))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=97)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    torch.manual_seed(1)
    model = Model(transformers.LlamaConfig(**GROUPED)).train()
    right = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = step(integration.apply(model, linear=True))
    assert_same(found, right)
    assert found[0].logits is None or torch.equal(found[0].logits, right[0].logits)


class _CappedBetween(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = 0.5 * (torch.tanh(logits * 0.7 / 5) * 5).float() / 1.5
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=97)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_factors_before_and_after_a_cap():
    torch.manual_seed(1)
    model = _CappedBetween(transformers.LlamaConfig(**GROUPED)).train()
    right = step(model)
    found = step(integration.apply(model, linear=True))
    assert found[0].logits is None
    assert_same(found, right)


# ---- what is refused ----


def test_a_model_with_a_loss_of_its_own_is_refused():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*softmax_ext\.patch\(\)"):
        integration.apply(model)


def test_another_kind_of_loss_is_refused():
    model = transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**GROUPED))
    with pytest.raises(ValueError, match="ForQuestionAnsweringLoss"):
        integration.apply(model)


def test_another_module_is_refused():
    with pytest.raises(TypeError, match=r"transformers\.PreTrainedModel"):
        integration.apply(torch.nn.Linear(2, 2))


def test_another_output_layer_is_refused():
    model = model_of()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 97))
    with pytest.raises(TypeError, match="Sequential"):
        integration.apply(model, linear=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.loss_function is transformers.loss.loss_utils.ForCausalLMLoss


def test_a_replaced_forward_is_refused():
    model = model_of()
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"Call apply before what replaces model\.forward"):
        integration.apply(model, linear=True)


def test_a_loss_function_of_the_users_is_refused():
    model = model_of()
    model.loss_function = custom = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(ValueError, match="loss_function"):
        integration.apply(model)
    assert model.loss_function is custom


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_backward_hooks_of_the_output_layer_are_refused(when, register):
    model = model_of()
    if when == "after":
        integration.apply(model, linear=True)
    getattr(model.lm_head, register)(lambda *args: None)
    with pytest.raises(TypeError, match="backward hooks"):
        integration.apply(model, linear=True) if when == "before" else step(model)


def test_a_forward_of_the_output_layers_own_is_refused():
    model = model_of()
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(TypeError, match="forward of its own"):
        integration.apply(model, linear=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_smoothing": 3.0}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"memory": 1 << 20}, "memory"),
        ({"logits_dtype": torch.float32}, "logits_dtype"),
        ({"linear": True, "memory": -1}, "memory"),
    ],
    ids=str,
)
def test_options_are_checked_at_once(options, text):
    model = model_of()
    with pytest.raises((ValueError, RuntimeError), match=rf"apply: .*{text}"):
        integration.apply(model, **options)


def test_another_thread_gets_logits():
    """While one trains, in the middle of its forward."""
    model = integration.apply(model_of(), linear=True)
    found = []

    def other():
        found.append(model(input_ids=batch()["input_ids"]).logits)

    def in_the_middle(module, inputs):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    model.lm_head.register_forward_pre_hook(in_the_middle)
    model(**batch())
    assert type(found[0]) is torch.Tensor


def test_shift_labels_alone_give_logits_and_no_loss():
    model = model_of()
    inputs = {"input_ids": batch()["input_ids"], "shift_labels": batch()["labels"]}
    right = model(**inputs)
    found = integration.apply(model, linear=True)(**inputs)
    assert found.loss is right.loss is None
    assert torch.equal(found.logits, right.logits)


def test_undo_after_something_has_wrapped_the_forward():
    """As accelerate's mixed precision does."""
    model = model_of()
    right = step(model)
    forward = integration.apply(model, linear=True).forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert step(model)[0].logits is None
    integration.apply(model, linear=True, z_loss=0.1)
    assert step(model)[0].loss > right[0].loss
    assert_same(step(integration.undo(model)), right)
    assert model.eval()(**batch()).logits is not None


def test_the_class_of_the_model_makes_models_of_its_own():
    model = integration.apply(model_of(), linear=True)
    for other in (type(model)(model.config), type(model)._from_config(model.config)):
        assert type(other) is transformers.LlamaForCausalLM
        assert other.train()(**batch()).logits is not None


def test_a_forward_that_calls_the_model_again():
    model = integration.apply(model_of(), linear=True)
    found = []

    def inside(module, inputs):
        if not found:
            found.append(None)
            found[0] = model(input_ids=batch()["input_ids"]).logits

    model.lm_head.register_forward_pre_hook(inside)
    outputs = model(**batch())
    assert type(found[0]) is torch.Tensor
    assert outputs.logits is None


def test_labels_of_another_number_are_refused():
    model = integration.apply(model_of(), linear=True)
    with pytest.raises(ValueError, match="labels must be as many as the 10 positions"):
        model(**batch(), logits_to_keep=5)


@pytest.mark.parametrize("form", ["dict", "the logits alone"])
def test_outputs_of_other_forms(form):
    class Model(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            if form != "dict":
                assert self.loss_function is not None
                return logits
            return {"loss": self.loss_function(logits=logits, labels=labels, vocab_size=97), "logits": logits}

    torch.manual_seed(1)
    model = Model(transformers.LlamaConfig(**GROUPED)).train()
    right = model(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = integration.apply(model, linear=True)(**batch())
    if form == "dict":
        assert found["logits"] is None
        torch.testing.assert_close(found["loss"], right["loss"])
    else:
        assert torch.equal(found, right)
