"""Trainers of other libraries with this package's loss: the same training as with their own."""

import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
from softmax_ext.integrations import transformers as integration  # noqa: E402

LOSSES = ["own", "logits", "linear"]


def model_of(loss):
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
    return model if loss == "own" else integration.apply(model, linear=loss == "linear")


def texts(count=48):
    """Rows of different lengths, as padding makes their micro-batches' means differ."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 16, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    labels = [row["input_ids"] + [-100] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}


def arguments(tmp_path, kind=transformers.TrainingArguments, **more):
    return kind(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=3,
        num_train_epochs=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        **more,
    )


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True)
def _accelerate_starts_anew():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_trainer_with_gradient_accumulation(tmp_path):
    rows = [{"input_ids": row} for row in texts()]
    curves, evaluations = {}, {}
    for loss in LOSSES:
        trainer = transformers.Trainer(
            model_of(loss), arguments(tmp_path), train_dataset=rows, eval_dataset=rows[:8], data_collator=padded
        )
        curves[loss] = curve(trainer)
        evaluations[loss] = trainer.evaluate()["eval_loss"]
    assert len(curves["own"]) == 12
    assert curves["own"][-1] < curves["own"][0] - 0.3
    for loss in LOSSES[1:]:
        assert curves[loss] == pytest.approx(curves["own"], rel=2e-4)
        assert evaluations[loss] == pytest.approx(evaluations["own"], rel=2e-4)


def test_accelerate_with_gradient_accumulation():
    import accelerate

    losses = {}
    for loss in LOSSES:
        model = model_of(loss).train()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses[loss] = []
        for begin in range(0, 32, 4):
            batch = padded([{"input_ids": row} for row in texts()[begin : begin + 4]])
            with accelerator.accumulate(model):
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[loss].append(outputs.loss.item())
    for loss in LOSSES[1:]:
        assert losses[loss] == pytest.approx(losses["own"], rel=2e-4)


def test_mixed_precision_of_accelerate():
    import accelerate

    losses = {}
    batch = padded([{"input_ids": row} for row in texts()[:4]])
    for loss in LOSSES:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(model_of(loss).train())
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        losses[loss] = outputs.loss
        assert outputs.loss.dtype == torch.float32
    for loss in LOSSES[1:]:
        torch.testing.assert_close(losses[loss], losses["own"], rtol=2e-3, atol=0)


def test_sft_trainer_of_trl(tmp_path):
    """TRL's SFTTrainer computes its loss itself, from the hidden states. The model must train as it does without us."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": row} for row in texts()])
    tokenizer = _tokenizer()
    curves = {}
    for loss in LOSSES:
        trainer = trl.SFTTrainer(
            model_of(loss),
            arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=16),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        curves[loss] = curve(trainer)
    assert len(curves["own"]) == 12
    for loss in LOSSES[1:]:
        assert curves[loss] == pytest.approx(curves["own"], rel=2e-4)


def _tokenizer():
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 97)}}
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def test_importing_the_package_imports_none_of_them():
    from processes import started

    names = ["transformers", "peft", "trl", "lightning", "accelerate"]
    code = f"import softmax_ext, sys; print([name for name in {names} if name in sys.modules])"
    assert started("-c", code).stdout.strip() == "[]"
    assert "transformers" in sys.modules
