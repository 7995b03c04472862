"""The chat template, rendered in one place for training and for generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tasks import Conversation


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the conversation up to where the model's answer begins."""
    ids: list[int] = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    return ids


def completion_ids(tokenizer: Any, conversation: Conversation, answer: str) -> list[int]:
    """Token ids of the answer as the template writes it, its end-of-turn token last.

    Raises ValueError where the template renders the prompt differently once the answer is there.
    """
    before = prompt_ids(tokenizer, conversation)
    turns = [*conversation, {"role": "assistant", "content": answer}]
    ids: list[int] = tokenizer.apply_chat_template(turns)["input_ids"]
    if ids[: len(before)] != before:
        raise ValueError("the chat template renders the prompt differently with and without the answer, so the answer's tokens are not known")
    answer_ids = ids[len(before) :]
    end = tokenizer.eos_token_id
    if end not in answer_ids:
        raise ValueError(f"the chat template does not end an answer with {tokenizer.eos_token!r}: a model trained on it would not learn to stop")
    return answer_ids[: len(answer_ids) - answer_ids[::-1].index(end)]
