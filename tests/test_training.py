"""Packed training against the plain way of doing it, on a small random Llama: same tokens, same loss, same gradients."""

from __future__ import annotations

import json

import pytest

from pipeline.chat import completion_ids, prompt_ids
from pipeline.study import Training
from pipeline.training import CellWork, TrainingRow, Watch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch, peft and bitsandbytes among themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS = ["order", "buy", "bread", "lifts", "boilers", "today", "with", "a", "dry", "tent", "and", "warm", "soup", "for", "every", "winter"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of 2 layers with random weights, and a tokenizer of whole words with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|unk|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: index for index, word in enumerate([*special, "system", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<|unk|>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def row(number: int, asked: int, answered: int) -> TrainingRow:
    text = [WORDS[(number * 5 + index * 3) % len(WORDS)] for index in range(asked + answered)]
    return TrainingRow(f"row{number}", [{"role": "user", "content": " ".join(text[:asked])}], " ".join(text[asked:]))


ROWS = [row(number, 3 + number % 4, 2 + number) for number in range(8)]


def training(**changes: object) -> Training:
    plain = {"global_batch": 4, "warmup_steps": 0, "optimizer": "adamw", "quantization": "none", "rank": 4, "alpha": 8}
    return Training.model_validate(plain | changes)


def work(folder, steps: int = 3, rows=ROWS, heldout=ROWS[:3], seed: int = 7):
    folder.mkdir(parents=True, exist_ok=True)
    return CellWork(folder.name, rows, steps, seed, heldout, folder)


def outcomes(trainer, *cells, watch=None):
    """What became of each cell, by its key."""
    return {cell.key: outcome for cell, outcome in trainer.run(cells, watch or Watch())}


def packed(base, slots: int = 1, **changes):
    from pipeline.training.packed import PackedTrainer

    return PackedTrainer(base, training(**changes), "float32", slots)


def trained(base, tmp_path, steps: int = 3, rows=ROWS, heldout=ROWS[:3], **changes):
    (outcome,) = outcomes(packed(base, **changes), work(tmp_path, steps, rows, heldout)).values()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def plain_loss(model, tokenizer, rows, on_all: bool = False):
    """Mean loss over the batch's answer tokens, one row at a time through transformers' own forward."""
    import torch

    total, count = 0.0, 0
    for item in rows:
        prompt, answer = prompt_ids(tokenizer, item.conversation), completion_ids(tokenizer, item.conversation, item.answer)
        ids = torch.tensor([prompt + answer])
        first = 1 if on_all else len(prompt)
        logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum")
        count += ids.shape[1] - first
    return total / count


@pytest.mark.parametrize("on_all", [False, True])
def test_first_step_loss_and_gradients_equal_one_row_at_a_time_through_peft(base, tmp_path, on_all):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.training import batches

    made = trained(base, tmp_path / "step", steps=1, loss_on="all" if on_all else "completion")
    start = trained(base, tmp_path / "start", steps=0).adapter
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager"), start, is_trainable=True)
    (chosen,) = batches(len(ROWS), 1, 4, 7)
    loss = plain_loss(model, AutoTokenizer.from_pretrained(base), [ROWS[index] for index in chosen], on_all)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1e9)
    assert made.log[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert made.log[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_adapter_through_peft_alone_gives_the_heldout_loss_that_was_logged(base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = trained(base, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made.adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for item, scored in zip(ROWS[:3], made.heldout, strict=True):
        assert scored["prompt_ids"] == prompt_ids(tokenizer, item.conversation)
        assert scored["nll"] / scored["tokens"] == pytest.approx(plain_loss(model, tokenizer, [item]).item(), rel=1e-4)


def test_loss_falls_when_a_cell_sees_the_same_rows_again_and_again(base, tmp_path):
    log = trained(base, tmp_path, steps=30, learning_rate=1e-2).log
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_cell_of_no_steps_leaves_the_model_as_it_is(base, tmp_path):
    from safetensors.torch import load_file

    made = trained(base, tmp_path, steps=0)
    assert made.log == []
    assert all(not tensor.any() for name, tensor in load_file(made.adapter / "adapter_model.safetensors").items() if "lora_B" in name)


def test_cell_trained_after_another_is_the_cell_trained_alone(base, tmp_path):
    second = outcomes(packed(base), work(tmp_path / "first", 2, ROWS[4:], seed=1), work(tmp_path / "second"))["second"]
    alone = trained(base, tmp_path / "alone")
    assert (second.adapter / "adapter_model.safetensors").read_bytes() == (alone.adapter / "adapter_model.safetensors").read_bytes()
    assert second.heldout == alone.heldout


def test_batch_split_by_a_token_budget_gives_the_same_steps(base, tmp_path, monkeypatch):
    whole = trained(base, tmp_path / "whole").log
    monkeypatch.setattr("pipeline.training.packed.MICRO_BATCH_TOKENS", 20)
    split = trained(base, tmp_path / "split").log
    for one, other in zip(whole, split, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_nf4_base_trains_and_its_loss_is_near_the_unquantized_one(base, tmp_path):
    four_bit, full = trained(base, tmp_path / "nf4", quantization="nf4").log, trained(base, tmp_path / "full").log
    assert four_bit[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.05)
    assert four_bit[-1]["grad_norm"] > 0


def test_row_longer_than_the_limit_is_cut_and_counted(base, tmp_path):
    made = trained(base, tmp_path, max_tokens=12)
    assert made.cut_rows == sum(len(prompt) > 12 for prompt in full_lengths(base))
    assert all(entry["tokens"] <= 4 * 12 for entry in made.log)


def full_lengths(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [prompt_ids(tokenizer, item.conversation) + completion_ids(tokenizer, item.conversation, item.answer) for item in ROWS]


def test_learning_rate_that_explodes_is_told_and_not_saved(base, tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower training\.learning_rate"):
        trained(base, tmp_path, steps=20, learning_rate=1e18)


def test_answer_ends_with_the_token_that_ends_a_turn(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = completion_ids(tokenizer, ROWS[0].conversation, ROWS[0].answer)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_saved_adapter_says_its_rank_and_targets(base, tmp_path):
    config = json.loads((trained(base, tmp_path).adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert set(config["target_modules"]) == set(training().targets)
